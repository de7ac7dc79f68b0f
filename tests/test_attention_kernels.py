"""The kernels that the start of a run names are those that it then runs in."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from recipes.models.causal_attention import block_mask, causal_attention
from trainer.attention_kernels import attention_kernels
from trainer.recipe import Recipe

MATH = "math (no fused kernel takes it)"


class Sum(Recipe[Any]):
    """Of whatever a network makes of x [batch, time, 16]."""

    name = "sum"

    def items(self, batch: dict[str, Any]) -> dict[str, int]:
        return {"sum": batch["x"].numel()}

    def loss(self, network: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"sum": network(batch["x"]).sum()}


class Causal(nn.Module):
    """Causal attention of x to itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return causal_attention(q, k, v, dropout=self.dropout).transpose(1, 2).flatten(2)


class Encoder(nn.TransformerEncoderLayer):
    """torch's own layer, which calls attention from within torch."""

    def __init__(self) -> None:
        super().__init__(16, 2, 32, dropout=0.0, batch_first=True)


class ByValue(Causal):
    """Cannot be run on shapes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x.abs().max().item())


def kernels_of(network: nn.Module, precision: str = "no", device: str = "meta", time: int = 8) -> str | None:
    sample = {"x": torch.randn(2, time, 16)}
    recipe = cast(Any, Sum())
    return attention_kernels(copy.deepcopy(network).to(device), recipe, sample, torch.device("cpu"), precision)


def kernels_run(network: nn.Module, precision: str) -> Counter[str]:
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        network.train()(torch.randn(2, 8, 16))
    names = {"aten::_scaled_dot_product_flash_attention_for_cpu": "flash", "aten::_scaled_dot_product_attention_math": MATH}
    return Counter(names[event.name] for event in cast(Any, profiler.events()) if event.name in names)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Causal(), {"flash": 1}),
        (Causal(dropout=0.5), {MATH: 1}),
        (nn.Sequential(Causal(), Causal(dropout=0.5), Causal()), {"flash": 2, MATH: 1}),
        (Encoder(), {"flash": 1}),
        (nn.Linear(16, 16), {}),
    ],
    ids=["causal", "dropout", "both", "torch's own layer", "none"],
)
def test_the_kernels_named_are_those_that_run(network: nn.Module, expected: dict[str, int], precision: str) -> None:
    assert kernels_run(network, precision) == expected
    one, *others = list(expected) or [None]
    text = one if not others else ", ".join(f"{name} ({calls} calls)" for name, calls in expected.items())
    assert kernels_of(network, precision) == kernels_of(network, precision, device="cpu") == text


class Wrong(Causal):
    """Fails in an operation of torch, on shapes as in earnest."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ x)


@pytest.mark.parametrize("network", [ByValue(), Wrong()], ids=lambda network: type(network).__name__)
def test_what_cannot_be_known_is_not_said_and_harms_nothing(
    network: nn.Module, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels_of(network) is None
    assert capfd.readouterr() == ("", "")
    logging.getLogger("torch").error("of later")
    assert caplog.messages == ["of later"]


def test_what_comes_before_values_are_needed_is_named() -> None:
    """As in a mixture of experts, whose router comes after attention."""
    expected = "flash in the first layers; the others depend on values"
    assert kernels_of(nn.Sequential(Causal(), ByValue())) == expected


@pytest.mark.filterwarnings("error:.*flex_attention called without torch.compile")
def test_flex_attention_is_still_compiled_afterwards() -> None:
    """Called on shapes alone, its compiled form would be kept as one that cannot be compiled."""

    class Documents(Causal):
        def forward(self, x: Tensor) -> Tensor:
            q = self.qkv(x)[:, None, :, :16].detach()  # on a CPU it has no backward pass
            return causal_attention(q, q, q, block_mask(torch.zeros(x.shape[:2], dtype=torch.long))) + self.qkv.bias.sum()

    network = Documents()
    assert kernels_of(network, time=128) == "FlexAttention"
    x = torch.randn(2, 128, 16)
    q = network.qkv(x)[:, None, :, :16]
    torch.testing.assert_close(network(x), causal_attention(q, q, q) + network.qkv.bias.sum())
