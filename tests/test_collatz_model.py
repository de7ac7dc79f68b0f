"""The Collatz transformer: what each head can see, and that training and evaluation compute the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recipes.collatz import Collatz, Config, OptimisationConfig, next_token_loss, stopping_loss
from recipes.data.collatz import CollatzStream, Layout
from recipes.models.collatz import PADDING, CollatzTransformer, predict_batch, sinusoids

MAX_LEN, PREFIX = 60, 20


def network(**changes: Any) -> CollatzTransformer:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "dropout": 0.0, "max_len": MAX_LEN}
    return CollatzTransformer(**{**sizes, "prefix_len": PREFIX, **changes}).eval()


def batch(layout: Layout | None = None, size: int = 40) -> dict[str, Tensor]:
    return CollatzStream(1, 10, 0.5, 0, layout or Layout(MAX_LEN, PREFIX)).__getitems__(range(size))


def outputs(model: CollatzTransformer, tokens: Tensor, digits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(tokens, tokens == PADDING, digits)


def differs(one: Tensor, two: Tensor) -> Tensor:
    return ((one - two).abs() > 1e-6).flatten(1).any(1)


# ------------------------------------------------------------------------------------------------------- no way to cheat


@pytest.mark.parametrize("place", [1, PREFIX - 1, PREFIX, 40, MAX_LEN - 1])
def test_no_later_token_changes_an_earlier_prediction(place: int) -> None:
    model, tokens = network(), batch()["tokens"]
    before, logits = outputs(model, tokens)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 3
    after, changed_logits = outputs(model, changed)
    assert torch.allclose(logits[:, :place], changed_logits[:, :place], atol=1e-6)
    assert differs(logits[:, place:], changed_logits[:, place:]).all()
    # And the stopping time sees the prefix alone: all of it, and nothing behind it.
    assert differs(before[:, None], after[:, None]).any().item() == (place < PREFIX)


def test_in_guide_mode_both_are_in_plain_sight() -> None:
    model, tokens = network(mode="guide"), batch()["tokens"]
    stopping, logits = outputs(model, tokens)
    changed = tokens.clone()
    changed[:, 10] = 1 - changed[:, 10].clamp(max=1)
    other, changed_logits = outputs(model, changed)
    long = (tokens != PADDING).sum(1) > 11
    assert differs(logits[long, 9:10], changed_logits[long, 9:10]).all()
    assert differs(stopping[long, None], other[long, None]).all()


@pytest.mark.parametrize("mode", ["honest", "guide"])
def test_padding_is_pooled_out(mode: str) -> None:
    """More of it behind the same numbers changes no prediction; and the numbers of a batch do not meet."""
    model, whole = network(mode=mode), batch()
    short = whole["steps"] < 40
    tokens = whole["tokens"][short]
    assert len(tokens) > 5
    stopping, logits = outputs(model, tokens[:, :40])
    longer, more_logits = outputs(model, tokens)
    assert torch.allclose(stopping, longer, atol=1e-6)
    real = tokens[:, :40] != PADDING
    assert torch.allclose(logits[real], more_logits[:, :40][real], atol=1e-5)
    alone = torch.cat([outputs(model, row[None])[0] for row in tokens])
    assert torch.allclose(alone, longer, atol=1e-5)


def test_the_binary_digits_alone_decide_the_stopping_time() -> None:
    model, shown = network(input="digits"), batch(Layout(MAX_LEN, PREFIX, digits=True))
    stopping, logits = outputs(model, shown["tokens"], shown["digits"])
    other, _ = outputs(model, (shown["tokens"] + 1) % 3, shown["digits"])
    assert torch.equal(stopping, other)
    digits = shown["digits"].clone()
    digits[:, 1] = 1 - digits[:, 1].clamp(max=1)
    changed, same_logits = outputs(model, shown["tokens"], digits)
    assert differs(stopping[:, None], changed[:, None]).all()
    assert torch.equal(logits, same_logits)
    fewer, _ = outputs(model, shown["tokens"], shown["digits"][:, :120])
    assert torch.allclose(stopping, fewer, atol=1e-6)
    with pytest.raises(ValueError, match="digits"):
        outputs(model, shown["tokens"])


def test_numbers_that_end_within_the_prefix_have_no_stopping_loss() -> None:
    shown = batch()
    inside = shown["steps"] <= PREFIX
    assert 3 < inside.sum() < 37
    assert torch.equal(shown["scored"], ~inside)
    loss = stopping_loss(torch.full((40,), 100.0), shown)
    assert torch.equal(loss > 0, ~inside)


# ------------------------------------------------------------------------------------------------------------ one network


@pytest.mark.parametrize("changes", [{}, {"mode": "guide"}, {"input": "digits"}])
def test_training_and_evaluation_mode_give_the_same(changes: dict[str, str]) -> None:
    model = network(**changes)
    shown = batch(Layout(MAX_LEN, PREFIX, digits="input" in changes))
    model.train()
    trained = predict_batch(model, shown)
    assert trained[0].requires_grad
    model.eval()
    with torch.no_grad():
        evaluated = predict_batch(model, shown)
    for one, two in zip(trained, evaluated, strict=True):
        assert torch.equal(one.detach(), two)
    with torch.inference_mode():
        assert torch.equal(predict_batch(model, shown)[1], evaluated[1])


def test_dropout_is_on_in_training_only() -> None:
    model, shown = network(dropout=0.5), batch()
    assert torch.equal(predict_batch(model, shown)[0], predict_batch(model, shown)[0])
    model.train()
    assert not torch.equal(predict_batch(model, shown)[0], predict_batch(model, shown)[0])


def test_in_bf16_a_predicted_stopping_time_is_fine_grained() -> None:
    """bf16 itself comes in steps of 0.03 between 4 and 8: a prediction would be off by up to 1.6 % of the number."""
    model, shown = network(), batch()
    exact = predict_batch(model, shown)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict_batch(model, shown)[0]
    assert exact.min() > 4
    assert (rounded - exact).abs().max() < 5e-3


def test_every_parameter_gets_a_gradient() -> None:
    """Else DDP waits for it."""
    for changes in ({}, {"mode": "guide"}, {"input": "digits"}):
        model, shown = network(**changes).train(), batch(Layout(MAX_LEN, PREFIX, digits="input" in changes))
        stopping, logits = predict_batch(model, shown)
        (stopping_loss(stopping, shown).sum() + next_token_loss(logits, shown).sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("input", ["parities", "digits"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(input: str) -> None:
    model = network(input=input)
    optimizer = Collatz().optimizer(model, Config(optimisation=OptimisationConfig(optimizer="muon")))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert by_muon == {"stopping.0.weight", *(f"layers.{i}.{part}" for i in range(2) for part in parts)}
    assert {names[id(p)] for g in optimizer.param_groups if not g["muon"] for p in g["params"]} == set(names.values()) - by_muon


def test_layers_start_with_weights_of_their_own() -> None:
    """nn.TransformerEncoder would copy one layer."""
    first, second = network().layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_it_is_torchs_encoder_layer_by_layer() -> None:
    model, tokens = network(mode="guide"), batch()["tokens"]
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    theirs.load_state_dict({f"layers.{name}": tensor for name, tensor in model.layers.state_dict().items()})
    padding = tokens == PADDING
    embedded = model.embed(tokens.long())
    states = theirs(embedded * 4.0 + sinusoids(MAX_LEN, 16), src_key_padding_mask=padding)
    logits = model.next_token(states)
    assert torch.allclose(logits[~padding], outputs(model, tokens)[1][~padding], atol=1e-5)
    mean = torch.stack([row[real].mean(0) for row, real in zip(states, ~padding, strict=True)])
    assert torch.allclose(model.stopping(mean)[:, 0] + math.log1p(200), outputs(model, tokens)[0], atol=1e-5)


def test_the_default_sizes() -> None:
    model = CollatzTransformer(128, 4, 4, 512, 0.1, 500)
    assert (
        sum(p.numel() for p in model.layers.parameters())
        == 4 * (4 * (128 * 129) + 129 * 512 + 513 * 128 + 4 * 128)  # attention, feed-forward, two norms
    )
    stopping, logits = model.eval()(torch.zeros(2, 499, dtype=torch.long), torch.zeros(2, 499, dtype=torch.bool))
    assert (stopping.shape, logits.shape) == ((2,), (2, 499, 3))


def test_positions_are_vaswanis() -> None:
    table = sinusoids(50, 6)
    for t in (0, 1, 49):
        for i in range(3):
            angle = torch.tensor(t / 10_000 ** (2 * i / 6))
            assert table[t, 2 * i].item() == pytest.approx(angle.sin().item(), abs=1e-5)
            assert table[t, 2 * i + 1].item() == pytest.approx(angle.cos().item(), abs=1e-5)


def test_flops_are_those_counted() -> None:
    model = network(mode="guide", d_model=32, num_heads=2, d_ff=128, max_len=65)
    tokens = torch.zeros(8, 64, dtype=torch.long)
    # It counts the matrix products of attention's plain form only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stopping, logits = model.train()(tokens, tokens == PADDING)
        (stopping.sum() + logits.sum()).backward()
    assert model.training_flops(64) == pytest.approx(counter.get_total_flops() / 8, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"d_model": 15, "num_heads": 1}, "d_model 15"),
        ({"d_model": 16, "num_heads": 3}, "num_heads 3"),
        ({"prefix_len": MAX_LEN}, f"prefix_len {MAX_LEN}"),
        ({"prefix_len": 0}, "prefix_len 0"),
        ({"mode": "guide", "input": "digits"}, "--input digits"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        network(**changes)
