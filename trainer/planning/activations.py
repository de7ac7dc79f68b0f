"""Counts the memory and FLOPs of a forward and backward pass of the real network, on fake tensors, which have no memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.evaluation.objective import Objective
from trainer.initial_weights import replace_tensors
from trainer.planning.memory import MicroStep
from trainer.recipe import Batch

_aten = torch.ops.aten
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Counter(TorchDispatchMode):
    """Counts the bytes of each storage from the operation that makes it until it is freed, and the FLOPs of each operation.

    `live`: bytes now, `gradients`: those of complete gradients, which are no longer in it; `most` and `most_with_gradients`:
    the peaks of `live` and of the sum of both.
    """

    def __init__(self, known: list[Tensor]) -> None:
        """The storages of `known` (weights, buffers, inputs) are not counted."""
        super().__init__()
        self.live = self.gradients = self.most = self.most_with_gradients = 0
        self.flops = 0.0
        self.sizes = dict.fromkeys((_memory(tensor) for tensor in known), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and _memory(tensor) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
                self.compare()
        return result

    def forget(self, memory: int) -> None:
        """Called when a storage is freed."""
        self.live -= self.sizes.pop(memory, 0)

    def take_gradient(self, parameter: Tensor) -> None:
        """Hook, called when the gradient of a parameter is complete: counts it in `gradients`, and frees it."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self.compare()

    def compare(self) -> None:
        """Update the peaks."""
        self.most = max(self.most, self.live)
        self.most_with_gradients = max(self.most_with_gradients, self.live + self.gradients)


def count_micro_step(objective: Objective, batch: Batch, precision: str, on_gpu: bool) -> tuple[MicroStep, MicroStep]:
    """(a forward and backward pass of a batch in `precision` (no, bf16, fp16), without torch.compile; the same where autocast
    does not keep its casts of the weights until the end of the forward pass, as under FSDP).

    Replaces the tensors of `objective` by fake ones. RuntimeError for an operation that fake tensors cannot do.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        replace_tensors(objective, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    inputs: Batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
    objective.train()
    with mode, _experts_as_one(), _attention_as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        cached = _count(objective, inputs, precision, cache=True)
        return cached, cached if precision == "no" else _count(objective, inputs, precision, cache=False)


def _count(objective: Objective, inputs: Batch, precision: str, cache: bool) -> MicroStep:
    counter = _Counter([*objective.parameters(), *objective.buffers(), *inputs.values()])
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(counter.take_gradient) for parameter in trained]
    with counter:
        with torch.autocast("cpu", _DTYPES[precision], enabled=precision != "no", cache_enabled=cache):
            sums = objective(inputs)
        sums.backward(torch.ones_like(sums))
    for hook in hooks:
        hook.remove()
    return MicroStep(counter.most, counter.most_with_gradients, counter.flops)


def _memory(tensor: Tensor) -> int:
    """An id of the tensor's storage."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _attention_as_on_a_gpu() -> Iterator[None]:
    """Attention without dropout: a GPU's kernels apply it internally, a CPU's would store all attention weights for it."""
    attention = F.scaled_dot_product_attention

    def without_dropout(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *more: Any, **other: Any
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *more, **other)

    F.scaled_dot_product_attention = without_dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


@contextlib.contextmanager
def _experts_as_one() -> Iterator[None]:
    """Multiplies every row of a mixture of experts by the first expert's matrix: the FLOPs and the tensors kept are the same.

    The fake form of torch's `grouped_mm` takes bf16 only, whereas the real one, which autocast leaves alone, takes fp32 too.
    """
    if not hasattr(F, "grouped_mm"):  # torch 2.9 has none
        yield
        return
    grouped = F.grouped_mm

    def by_the_first(mat_a: Tensor, mat_b: Tensor, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return mat_a @ mat_b[0]

    F.grouped_mm = by_the_first
    try:
        yield
    finally:
        F.grouped_mm = grouped
