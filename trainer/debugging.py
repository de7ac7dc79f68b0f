"""`--debug`: describes the first batch and the first forward pass, and names the module where a value first is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import NOT_FINITE, UserError
from trainer.recipe import Log


def describe_batch(batch: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor of a batch: its shape, dtype, least and largest value."""
    return [f"  {name}: {_form(t)}" + (f", {t.min():g} to {t.max():g}" if t.numel() else "") for name, t in batch.items()]


class Watch:
    """Logs the shapes and dtypes of a network's first forward pass. Raises a UserError (NOT_FINITE) at the first output or
    gradient that is not finite.

    Slow: each pass waits for the device once per module, and autograd's anomaly mode keeps the stack of every operation, to
    print that of the one whose gradient failed.
    """

    def __init__(self, network: nn.Module, log: Log, step: Callable[[], int]) -> None:
        """`step()` is the number of the step that is being taken. The hooks stay on `network` for good."""
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        self.network, self.log, self.step = network, log, step
        self.first_pass: list[str] | None = []
        for name, module in network.named_modules():
            shown = f"{name or 'the network'} ({type(module).__name__})"
            module.register_forward_hook(partial(self._after, shown), with_kwargs=True)

    def _after(self, name: str, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        outputs = [*_tensors(output)]
        if self.first_pass is not None:
            self.first_pass.append(f"  {name}: {', '.join(map(_form, outputs)) or 'no tensor'}")
            if module is self.network:
                self.log("\n".join(["The first pass, as each module ends:", *self.first_pass]))
                self.first_pass = None
        if not _finite(outputs):
            given = "finite" if _finite(_tensors([arguments, keywords])) else "not finite either"
            weights = "" if _finite(module.parameters()) else ", and neither are some of its weights"
            raise self._error(f"the output of {name} is not finite, its input is {given}{weights}")
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Tensor) -> None:
        if not _finite([gradient]):
            raise self._error(f"the gradient of the output of {name} is not finite, the first one in the backward pass")

    def _error(self, what: str) -> UserError:
        return UserError(f"step {self.step():,}: {what}; the same command comes to this step again", NOT_FINITE)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
