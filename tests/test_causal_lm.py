"""Four families of language models of transformers: filled from their own files, packed, adapted, frozen, opened again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import trainer_state
from tiny_models import FAMILIES, model_folder, rows_folder

from recipes.finetune_lm import FinetuneLM
from recipes.models.causal_lm import build_causal_lm, named_as_in
from recipes.models.gpt2 import build_gpt2
from trainer.backends.tensors import TensorEntry
from trainer.checkpoints import writing
from trainer.checkpoints.init_from import with_settings
from trainer.checkpoints.network import build_empty_network, first_weights, is_kept
from trainer.checkpoints.pretrained import stored_tensors
from trainer.command_line import config as configuration
from trainer.data.stream import length_of
from trainer.distributed.launch import alone
from trainer.errors import UserError
from trainer.initial_weights import build_empty, fill
from trainer.optimisation.averages import AVERAGE, COUNT

RECIPE = FinetuneLM()
IDS = torch.arange(2 * 24).view(2, 24) % 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family, and `rows`."""
    root = tmp_path_factory.mktemp("models")
    return {family: model_folder(family, root / family) for family in FAMILIES} | {"rows": rows_folder(root / "rows")}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))


def planned(folders: dict[str, Path], family: str, *more: str) -> Any:
    """The configuration that a run begins with."""
    argv = ["--init_from", str(folders[family]), "--data_dir", str(folders["rows"]), "--max_length", "32", *more]
    return with_settings(RECIPE, configuration.parse(RECIPE.config_class, {}, argv, RECIPE.name), argv).config


def begun(config: Any) -> Any:
    """The network as a run begins with it."""
    network, initial = build_empty_network(RECIPE, config, None)  # type: ignore[arg-type]
    init_from = config.optimisation.init_from
    weights = first_weights(RECIPE, network, initial, None, init_from, alone().control, lambda _: None)
    fill(network, weights, torch.device("cpu"))
    return network.eval()


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    return network(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_begins_with_the_network_of_the_folder(family: str, folders: dict[str, Path]) -> None:
    expected = logits(theirs(folders[family]))
    assert float(expected.std()) > 0.01
    network = begun(planned(folders, family))
    assert logits(network).equal(expected)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == (family in ("gpt2", "qwen3"))

    adapted = begun(planned(folders, family, "--lora_rank", "4"))
    assert logits(adapted).equal(expected)  # an adapter begins as nothing
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    assert not torch.allclose(logits(adapted), expected, atol=1e-3)

    last = begun(planned(folders, family, "--train_last", "1"))
    trained = {name.partition(".1.")[0] for name, p in last.named_parameters() if p.requires_grad}
    assert trained == {"transformer.h" if family == "gpt2" else "model.layers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_are_learnt_as_if_each_stood_alone(family: str, folders: dict[str, Path]) -> None:
    packed, alone_ = (RECIPE.build_data(planned(folders, family, *more)).train for more in ([], ["--no_packing"]))
    network = begun(planned(folders, family))
    assert length_of(packed) < length_of(alone_)
    with torch.no_grad():
        together, apart = packed.__getitems__(range(len(packed))), alone_.__getitems__(range(len(alone_)))
        assert RECIPE.items(together) == RECIPE.items(apart)
        assert "position_ids" not in apart
        loss, expected = (RECIPE.loss(network, batch)["next_token"] for batch in (together, apart))
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        del together["position_ids"]
        mixed = RECIPE.loss(network, together)["next_token"]
    assert abs(float(mixed / expected) - 1) > 1e-4, "examples that see each other give the same loss: the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_opens_in_transformers(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = planned(folders, family)
    network, data = begun(config), RECIPE.build_data(config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    entries = [
        TensorEntry(name, tuple(p.shape), torch.float32, lambda _, p=p: p.detach().clone())
        for name, p in network.named_parameters()
    ]
    texts = {"trainer_state.json": trainer_state(1), "config.yaml": configuration.to_yaml(config)}
    files = RECIPE.checkpoint_files(config, network, data)
    saved = writing.write(tmp_path, "checkpoint_step_1", {"model": entries}, {**texts, **files})  # type: ignore[dict-item]
    assert torch.allclose(logits(theirs(saved)), logits(network), atol=1e-6)
    assert AutoTokenizer.from_pretrained(saved)("a river").input_ids == data.extra["tokenizer"]("a river").input_ids
    written = json.loads((saved / "config.json").read_text())
    assert written["architectures"] == [type(network).__name__]
    assert (written["dtype"], written["use_cache"]) == ("float32", True)
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == 0


def test_a_checkpoint_of_gpt2_wikitext_is_a_model_folder_too(folders: dict[str, Path], tmp_path: Path) -> None:
    end = 0
    ours = build_gpt2(300, end, max_length=64, d_model=32, num_layers=2, num_heads=2, d_ff=None, dropout=0.0).eval()
    entries = [
        TensorEntry(name, tuple(p.shape), torch.float32, lambda _, p=p: p.detach()) for name, p in ours.named_parameters()
    ]
    texts = {"trainer_state.json": trainer_state(1, recipe="gpt2_wikitext"), "config.yaml": "model: {}\n"}
    texts |= {"config.json": ours.config.to_json_string(), "generation_config.json": ours.config.generation_json()}
    texts["tokenizer.json"] = (folders["gpt2"] / "tokenizer.json").read_text()
    saved = writing.write(tmp_path, "checkpoint_step_1", {"model": entries}, texts)
    config = planned({**folders, "ours": saved}, "ours", "--lora_rank", "2")
    with torch.no_grad():
        assert torch.allclose(logits(begun(config)), ours(IDS), atol=1e-5)
    assert RECIPE.build_data(config).extra["tokenizer"].eos_token_id == end


@pytest.fixture(scope="module")
def fine_tuned(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Own checkpoints of a Llama, of runs with --train_last 1, --lora_rank 2 and --ema."""
    root, saved = tmp_path_factory.mktemp("fine_tuned"), dict(folders)
    for name, more in {"last": ["--train_last", "1"], "lora": ["--lora_rank", "2"], "ema": ["--ema", "0.9"]}.items():
        config = planned(folders, "llama", *more)
        network = begun(config)
        kept = [(key, p.detach() + 0.01) for key, p in network.named_parameters() if is_kept(network, key)]
        averages = [(COUNT, torch.ones(())), *((f"{AVERAGE}.{key}", value) for key, value in kept)] if name == "ema" else []
        entries = {
            stem: [TensorEntry(key, tuple(v.shape), torch.float32, lambda _, v=v: v) for key, v in tensors]
            for stem, tensors in (("model", kept), ("optimizer", averages))
        }
        texts = {"trainer_state.json": trainer_state(1, recipe="finetune_lm"), "config.yaml": configuration.to_yaml(config)}
        texts["tokenizer.json"] = (folders["llama"] / "tokenizer.json").read_text()
        saved[name] = writing.write(root, f"checkpoint_step_{len(saved)}", entries, texts)  # type: ignore[arg-type]
    return saved


def test_what_was_trained_of_a_checkpoint_is_chosen_anew(fine_tuned: dict[str, Path]) -> None:
    config = planned(fine_tuned, "last")
    assert (config.model.train_last, config.model.max_length) == (0, 32)
    whole = begun(config)
    assert all(p.requires_grad for p in whole.parameters())
    assert torch.allclose(logits(begun(planned(fine_tuned, "last", "--train_last", "2"))), logits(whole))
    adapted = begun(planned(fine_tuned, "last", "--lora_rank", "4"))
    assert torch.allclose(logits(adapted), logits(whole))
    assert not torch.allclose(logits(whole), logits(theirs(fine_tuned["llama"])))
    with pytest.raises(UserError, match="has averages of --ema"):
        begun(planned(fine_tuned, "ema", "--lora_rank", "4"))


def test_adapters_go_on_as_they_are_or_are_merged_first(fine_tuned: dict[str, Path]) -> None:
    config = planned(fine_tuned, "lora")
    assert config.model.lora_rank == 2
    begun(config)
    with pytest.raises(UserError, match=r"lora_rank: .* has 2, asked for 0; .*export_hf"):
        planned(fine_tuned, "lora", "--lora_rank", "0")


def test_other_weights_below_the_adapters_are_other_data(folders: dict[str, Path], tmp_path: Path) -> None:
    """No checkpoint of adapters keeps them, so a resumed run has to find the ones that it began with."""
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    where = {**folders, "copy": copy}
    first = [RECIPE.build_data(planned(where, "copy", *more)).fingerprint for more in ([], ["--lora_rank", "2"])]
    again = RECIPE.build_data(planned(where, "llama", "--lora_rank", "2")).fingerprint
    assert again == first[1] != first[0]
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    after = [RECIPE.build_data(planned(where, "copy", *more)).fingerprint for more in ([], ["--lora_rank", "2"])]
    assert after[0] == first[0]
    assert after[1] != first[1]


@pytest.mark.parametrize(
    ("family", "argv", "words"),
    [
        ("gpt2", ["--train_last", "3"], "train_last 3 is more than the 2 blocks"),
        ("gpt2", ["--train_last", "1", "--lora_rank", "2"], "keep one"),
        ("gpt2", ["--max_length", "65"], "max_length 65 is more than the 64 positions"),
    ],
)
def test_what_cannot_be_built_is_named(family: str, argv: list[str], words: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=words):
        begun(planned(folders, family, *argv))


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"model_type": "vit"}, "model_type 'vit' is no causal language model"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_named(architecture: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_causal_lm(json.dumps(architecture), train_last=0, lora_rank=0, lora_alpha=1)


def test_a_network_that_would_mix_packed_examples_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    small = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(
        UserError, match="MambaForCausalLM would mix examples that are packed into one sample; add --no_packing"
    ):
        build_empty_network(RECIPE, planned({**folders, "mamba": tmp_path}, "mamba"), None)  # type: ignore[arg-type]
    build_empty_network(RECIPE, planned({**folders, "mamba": tmp_path}, "mamba", "--no_packing"), None)  # type: ignore[arg-type]


def test_experts_are_read_and_put_together_for_the_rows_that_are_wanted(folders: dict[str, Path]) -> None:
    stored = stored_tensors(str(folders["mixtral"]))
    architecture = (folders["mixtral"] / "config.json").read_text()
    empty, _ = build_empty(lambda: build_causal_lm(architecture, train_last=0, lora_rank=0, lora_alpha=1), 0)
    whole = theirs(folders["mixtral"]).model.layers[1].mlp.experts.gate_up_proj
    experts = named_as_in(empty, stored)["model.layers.1.mlp.experts.gate_up_proj"]  # type: ignore[arg-type]
    assert experts.shape == tuple(whole.shape)
    assert experts.read(slice(1, 3)).equal(whole[1:3])
