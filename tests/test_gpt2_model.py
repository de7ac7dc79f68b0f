"""GPT-2 and its loss against transformers' own, and its guaranteed properties."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.commands.language_model import perplexity
from recipes.data.text import TokenSplit
from recipes.data.token_samples import IGNORED, TokenBlocks, TokenRows
from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from recipes.models.gpt2 import as_transformers, build_gpt2
from recipes.models.next_token_loss import next_token_loss
from trainer.evaluation.objective import Objective

RECIPE = Gpt2Wikitext()
END = 0


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"max_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": None, "dropout": 0.0}
    return build_gpt2(50, END, **{**sizes, **changes})


def split(ids: np.ndarray, row_length: int = 10) -> TokenSplit:
    ends = np.append(np.arange(row_length, len(ids), row_length), len(ids))
    ids = ids.copy()
    ids[ends - 1] = END
    return TokenSplit(ids.astype(np.uint16), ends, words=len(ids), fingerprint="")


def random_split(count: int = 200) -> TokenSplit:
    return split(np.random.RandomState(0).randint(1, 50, count))


def in_transformers(network: Any, activation: str = "gelu_new") -> Any:
    """A copy in transformers' own GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = json.loads(network.config.to_json_string()) | {"activation_function": activation}
    theirs = GPT2LMHeadModel(GPT2Config(**config)).eval()
    theirs.load_state_dict(network.state_dict())
    return theirs


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_transformers_own() -> None:
    network, data = tiny().eval(), random_split()
    blocks = TokenBlocks(data, 15, 50, END)
    batch = blocks.__getitems__([0, 3, 7])
    ours = RECIPE.loss(network, batch)["next_token"] / RECIPE.items(batch)["next_token"]
    whole = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1)
    assert whole.shape == (3, 16)
    theirs = in_transformers(network)(input_ids=whole, labels=whole).loss  # it shifts the labels by itself
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_logits_and_gradients_are_transformers_own() -> None:
    """Published GPT-2s say `gelu_new`, seven operations for the function that torch has in one."""
    network, data = tiny(num_layers=3), random_split()
    others = [in_transformers(network), in_transformers(network, "gelu_pytorch_tanh")]
    batch = TokenBlocks(data, 15, 50, END).__getitems__([0, 3, 7])
    (RECIPE.loss(network, batch)["next_token"] / RECIPE.items(batch)["next_token"]).backward()
    whole = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1)
    for theirs in others:
        output = theirs(input_ids=whole, labels=whole)
        output.loss.backward()
        torch.testing.assert_close(network(whole), output.logits, rtol=1e-5, atol=1e-6)
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        assert gradients.keys() == {name for name, _ in network.named_parameters()}
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("random", [False, True])
def test_generation_is_transformers_own(random: bool) -> None:
    network, ids = tiny().eval(), torch.tensor([[3, 1, 4]])
    settings: dict[str, Any] = {"do_sample": random, "max_new_tokens": 8, "pad_token_id": END, "attention_mask": ids > -1}
    continued = []
    for model in (as_transformers(network), in_transformers(network)):
        torch.manual_seed(1)
        continued.append(model.generate(ids, **settings).tolist())
    assert continued[0] == continued[1]
    weights = dict(network.named_parameters())
    for name, p in as_transformers(network).named_parameters():
        assert p.data_ptr() == weights[name].data_ptr()  # not a copy


def test_config_json_is_what_other_libraries_look_for() -> None:
    """vLLM and llama.cpp stop without `architectures`; without `use_cache` every token is generated from the whole prefix."""
    from transformers import AutoConfig

    written = json.loads(tiny().config.to_json_string())
    assert (written["architectures"], written["dtype"], written["use_cache"]) == (["GPT2LMHeadModel"], "float32", True)
    named = {name: value for name, value in written.items() if name != "model_type"}
    assert AutoConfig.for_model("gpt2", **named).to_dict().items() >= {"n_embd": 32, "n_layer": 2, "n_inner": 128}.items()


class Oracle(torch.nn.Module):
    """A network that is certain of a given token at each position."""

    def __init__(self, token: Any) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        certain = 30.0 * torch.nn.functional.one_hot(self.token(input_ids), 50).float()
        return next_token_loss(certain, torch.eye(50), labels)


@pytest.mark.parametrize("cut", [TokenBlocks, TokenRows])
def test_position_t_is_trained_on_token_t_plus_1(cut: type) -> None:
    """In the text 1 2 3 4 ... the model that predicts "one more" is right, and the one that copies its input is wrong."""
    ids = np.tile(np.arange(1, 41), 3)
    data = TokenSplit(ids.astype(np.uint16), np.array([40, 80, 120]), 120, "")
    batch = cut(data, 12, 50, END).__getitems__([0, 1, 2])
    count = RECIPE.items(batch)["next_token"]
    assert count > 20
    losses = {
        shift: RECIPE.loss(Oracle(lambda ids, shift=shift: (ids - 1 + shift) % 40 + 1), batch)["next_token"].item() / count
        for shift in (0, 1, 2)
    }
    assert losses[1] < 1e-3
    assert losses[0] > 20
    assert losses[2] > 20


def trained_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Loss on `held_out` after a little training on `train`, both ids."""
    network = tiny(num_layers=1)
    blocks, other = (TokenBlocks(split(ids), 16, 50, END) for ids in (train, held_out))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    random = np.random.RandomState(1)
    for _ in range(30):
        batch = blocks.__getitems__(random.randint(0, len(blocks), 16))
        (RECIPE.loss(network, batch)["next_token"] / RECIPE.items(batch)["next_token"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = other.__getitems__(range(len(other)))
    with torch.no_grad():
        return RECIPE.loss(network.eval(), batch)["next_token"].item() / RECIPE.items(batch)["next_token"]


def test_it_learns_what_follows_and_not_to_copy() -> None:
    """On random text the loss stays at its entropy (ln 49, less for every tenth token); a leaked target would take it to 0."""
    random = np.random.RandomState(2)
    assert 3.0 < trained_loss(random.randint(1, 50, 3000), random.randint(1, 50, 500)) < 5.0
    counting = np.tile(np.arange(1, 11), 300)  # 1 to 9, end of text
    assert trained_loss(counting, counting[:450]) < 0.5


def test_items_count_what_the_loss_sums_over() -> None:
    data = random_split(47)
    for dataset in (TokenBlocks(data, 16, 50, END), TokenRows(data, 16, 50, END)):
        batch = dataset.__getitems__(range(len(dataset)))
        count = RECIPE.items(batch)["next_token"]
        hidden = torch.zeros(*batch["labels"].shape, 1)
        total = next_token_loss(hidden, torch.zeros(50, 1), batch["labels"]).item()
        assert total / count == pytest.approx(np.log(50), rel=1e-5)
        assert count == (46 if isinstance(dataset, TokenBlocks) else 47 - 5)


def test_padding_further_changes_no_loss() -> None:
    network = tiny().eval()
    rows = TokenRows(split(np.random.RandomState(0).randint(1, 50, 60), 7), 16, 50, END)
    batch = rows.__getitems__([0, 1, 2])
    longer = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=END),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=IGNORED),
    }
    assert RECIPE.items(longer) == RECIPE.items(batch)
    for precision in (torch.float32, torch.float64):
        model = network.to(precision)
        short, padded = (RECIPE.loss(model, b)["next_token"].item() for b in (batch, longer))
        assert padded == pytest.approx(short, rel=1e-6)


def test_a_batch_without_labels_has_loss_0_and_finite_gradients() -> None:
    network = tiny()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), IGNORED)}
    assert RECIPE.items(batch) == {"next_token": 0}
    loss = RECIPE.loss(network, batch)["next_token"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_what_leaves_the_objective_is_scalars() -> None:
    batch = TokenBlocks(random_split(), 15, 50, END).__getitems__([0, 1])
    objective = Objective(tiny(), RECIPE, ["next_token"])
    assert objective(batch).shape == (1,)
    measured = objective(batch, measuring=True)["next_token"]
    assert (measured.dtype, measured.shape) == (torch.float64, (1,))  # its items are counted on the host
    assert measured[0].item() == pytest.approx(objective(batch)[0].item(), rel=1e-6)


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(np.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == float("inf")
    assert RECIPE.derive({"loss": 0.0}) == {"perplexity": 1.0}


def test_console_lines() -> None:
    metrics = {"train/loss": 6.95566, "train/learning_rate": 4e-5, "train/grad_norm": 2.2264, "train/perplexity": 1049.0}
    metrics |= {"train/iter_time_ms": 143.49, "train/tokens_per_sec": 7138.4, "train/data_wait_fraction": 0.0}
    line = "Step    100 | Loss: 6.9557 | LR: 4.00e-05 | Grad norm: 2.226 | Time: 143.5ms | Tokens/sec: 7138"
    assert RECIPE.report.log_line(100, metrics) == line
    evaluated = RECIPE.report.evaluation_line(500, {"eval/val_loss": 4.25, "eval/val_perplexity": 70.10541})
    assert evaluated == "Evaluating at step 500... val_loss: 4.2500 | val_perplexity: 70.1054"


# -------------------------------------------------------------------------------------------------------------- model


def test_the_default_model_has_124439808_parameters() -> None:
    m = Config().model
    with torch.device("meta"):
        network = build_gpt2(50257, 50256, **vars(m))
    assert sum(p.numel() for p in network.parameters()) == 124_439_808
    c = network.config
    assert (c.n_embd, c.n_layer, c.n_head, c.n_inner, c.n_positions) == (768, 12, 12, 3072, 1024)
    assert (c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) == (0.1, 0.1, 0.1)
    assert (c.eos_token_id, c.vocab_size) == (50256, 50257)
    assert network.lm_head.weight is network.transformer.wte.weight


def test_residual_projections_start_smaller() -> None:
    network = tiny(d_model=128, num_layers=8)
    for name, p in network.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.05), name
        elif p.ndim == 2 and "wpe" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not p.any()


def test_the_first_loss_is_that_of_guessing() -> None:
    batch = TokenBlocks(random_split(), 15, 50, END).__getitems__(range(10))
    loss = RECIPE.loss(tiny(), batch)["next_token"].item() / RECIPE.items(batch)["next_token"]
    assert loss == pytest.approx(np.log(50), abs=0.1)


def test_heads_of_64_by_default() -> None:
    with torch.device("meta"):
        for width, heads in ((64, 1), (512, 8), (768, 12), (1024, 16)):
            assert tiny(d_model=width, num_heads=None, num_layers=1).config.n_head == heads
        assert tiny(d_model=768, num_heads=6, num_layers=1).config.n_head == 6
        assert tiny(d_model=32, num_heads=None, num_layers=1).config.n_head == 1


@pytest.mark.parametrize(("width", "heads", "expected"), [(1024, 12, 12), (200, None, 3)])
def test_a_width_that_does_not_divide_is_refused(width: int, heads: int | None, expected: int) -> None:
    with pytest.raises(ValueError, match=rf"d_model {width} does not divide into {expected} heads.*--num_heads"):
        tiny(d_model=width, num_heads=heads)


def test_flops_by_hand() -> None:
    """Width 4, inner 8, one layer, 10 tokens, length 6: weights 3*16 + 16 + 2*32 + 40 = 168; 6*168 + 12*4*6 = 1296."""
    sizes = {"max_length": 6, "d_model": 4, "num_layers": 1, "num_heads": 1, "d_ff": 8, "dropout": 0.0}
    assert build_gpt2(10, END, **sizes).training_flops_per_token() == 1296.0
    with torch.device("meta"):
        network = tiny(d_model=32, num_layers=3, d_ff=64, max_length=7)
    per_layer = 32 * 96 + 32 * 32 + 2 * 32 * 64
    assert RECIPE.flops_per_item(Config(), network) == 6 * (3 * per_layer + 50 * 32) + 12 * 3 * 32 * 7


def test_no_weight_decay_on_biases_and_norms() -> None:
    network, config = tiny(), Config()
    config = replace(config, optimisation=replace(config.optimisation, weight_decay=0.25))
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, rest = RECIPE.parameter_groups(network, config)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    in_rest = {names[id(p)] for p in rest["params"]}
    in_decayed = {names[id(p)] for p in decayed["params"]}
    assert in_rest == {name for name in names.values() if name.endswith("bias") or "ln_" in name}
    assert in_decayed | in_rest == set(names.values())
    assert "transformer.wte.weight" in in_decayed
    assert sum(len(group["params"]) for group in (decayed, rest)) == len(names)
