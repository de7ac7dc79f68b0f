"""Which of torch's kernels attention runs in: that depends on shapes, dtypes, masks, dropout and the GPU."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.evaluation.objective import Objective
from trainer.initial_weights import replace_tensors
from trainer.recipe import Batch, Recipe

_NAMES = {"cudnn": "cuDNN", "flash": "flash", "efficient": "memory-efficient"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Kernels(TorchDispatchMode):
    """Counts calls of scaled_dot_product_attention by the kernel that torch chooses for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.attention = F.scaled_dot_product_attention

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = func.overloadpacket.__name__
        if operation.startswith("_scaled_dot_product"):
            self.calls[next((name for part, name in _NAMES.items() if part in operation), operation)] += 1
        return func(*args, **(kwargs or {}))

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces scaled_dot_product_attention: calls it, and counts it as `math` if it used no fused kernel."""
        before = self.calls.total()
        attended = self.attention(*args, **kwargs)
        if self.calls.total() == before:
            self.calls["math (no fused kernel takes it)"] += 1
        return attended

    def attend_flex(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Replaces flex_attention, which a dispatch mode cannot observe: counts the call, and returns an empty result."""
        self.calls["FlexAttention"] += 1
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No word from torch, which writes the whole traceback of an operation that it cannot do on shapes."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def attention_kernels(network: nn.Module, recipe: Recipe, sample: Batch, device: torch.device, precision: str) -> str | None:
    """The kernels as text, such as "flash" or "cuDNN (10 calls), memory-efficient (2 calls)"; None if there is no attention.

    Found by a forward pass of a copy of `network` (which may be on the meta device) on fake tensors, which have shapes alone.
    Where that pass fails, as in a mixture of experts, which chooses them by value, the kernels up to there.
    """
    mode, kernels, dtype = FakeTensorMode(allow_non_fake_inputs=True), _Kernels(), _DTYPES.get(precision)
    rest = ""
    try:
        objective = Objective(copy.deepcopy(network).train(), recipe, list(recipe.items(sample)))
        with _silence(), mode:
            replace_tensors(objective, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
            batch = {name: mode.from_tensor(tensor).to(device) for name, tensor in sample.items()}
            autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
            # What would be compiled here, on shapes, would not be compiled again for the real step.
            eager = torch.compiler.set_stance("force_eager")
            sdpa = patch.object(F, "scaled_dot_product_attention", kernels.attend)
            flex = patch.object(flex_attention, "flex_attention", kernels.attend_flex)
            with sdpa, flex, autocast, eager, kernels:
                objective(batch)
    except Exception:  # a line in the log is worth no failure
        rest = " in the first layers; the others depend on values"
    if not kernels.calls:
        return None
    if len(kernels.calls) == 1:
        return next(iter(kernels.calls)) + rest
    return ", ".join(f"{kernel} ({calls} calls)" for kernel, calls in kernels.calls.items()) + rest
