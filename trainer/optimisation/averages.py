"""`--ema`: an exponential moving average of every weight.

The optimizer keeps it as one more state of the parameter, so it is sharded, saved and resumed like a moment, under any launch.
With decay d, step t moves the average by max(1 - d, 1 / t) of its distance to the weight. So at first it is the plain mean of
the weights so far (Polyak and Juditsky 1992), then exponential, and the initial weights have no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

AVERAGE, COUNT = "ema", "ema_steps"
"""keys of a parameter's state: its average, and how many steps are in it"""


def keep_averages(optimizer: Optimizer, decay: float) -> Optimizer:
    """Make `optimizer` update the averages after every step that it takes. Returns the optimizer."""
    optimizer.register_step_post_hook(partial(_average, decay))
    return optimizer


@torch.no_grad()
def _average(decay: float, optimizer: Any, _args: Any, _kwargs: Any) -> None:
    """Update the averages, but not for a step that the device skipped (`found_inf`). Reads nothing on the host."""
    skipped = getattr(optimizer, "found_inf", None)
    applied = 1.0 if skipped is None else 1.0 - skipped
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        if AVERAGE not in optimizer.state[p]:
            optimizer.state[p] |= {AVERAGE: torch.zeros_like(p), COUNT: torch.zeros((), device=p.device)}
    counts = [optimizer.state[p][COUNT] for p in parameters]
    torch._foreach_add_(counts, applied)
    rates = torch._foreach_clamp_min(counts, 1.0)
    torch._foreach_reciprocal_(rates)
    torch._foreach_clamp_min_(rates, 1.0 - decay)
    torch._foreach_mul_(rates, applied)
    for p, rate in zip(parameters, rates, strict=True):
        _local(optimizer.state[p][AVERAGE]).lerp_(_local(p), rate.to(p.device))  # a restored count may lie on the host


@torch.no_grad()
def swap(weight: Tensor, state: Mapping[str, Any]) -> None:
    """Exchange a weight and its average in place, if the average has seen a step."""
    if AVERAGE in state and state[COUNT] > 0:
        own, average = _local(weight), _local(state[AVERAGE])
        kept = own.clone()
        own.copy_(average)
        average.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
