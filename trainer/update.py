"""One optimizer step: backward of each micro-batch, clipping, the finite check, the update. Two forms, one interface.

`network` here is the prepared objective. The gradient of the objective is a sum over all samples of a step, each divided by a
global count; so averages that a backend takes by itself (over ranks, over micro-batches) are multiplied back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Step(NamedTuple):
    """What became of a step. Device scalars: reading them waits for the device."""

    grad_norm: Tensor
    """global gradient norm before clipping"""
    bad: Tensor
    """1.0 if the norm was not finite, so no weight was changed, and a loss scale on its way down does not explain it"""
    by_layer: dict[str, Tensor] = {}
    """gradient norm, before clipping, of the layers that were asked for"""


def layers(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{layer: its trained parameters}. A name is cut after its first number (`blocks.0`), else before its last part."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
        if parameter.requires_grad:
            found.setdefault(".".join(parts[:end]), []).append(parameter)
    return found


class LossScale:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved at an overflow, doubled after 2,000 clean steps."""

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, scale: float = 2.0**16, growth: int = 0) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.growth = torch.tensor(growth, device=device)

    def update(self, overflow: Tensor) -> None:
        """Adapt to a step; `overflow` is a scalar, 1.0 where its gradients were not finite. Reads nothing on the host."""
        clean = torch.where(overflow > 0, 0, self.growth + 1)
        grow = clean >= self.GROWTH_INTERVAL
        self.scale = torch.where(overflow > 0, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.growth = torch.where(grow, 0, clean)


class PlainUpdate:
    """One process, or DDP."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: LossScale | None,
        processes: int,
        grad_clip: float,
    ) -> None:
        self.network, self.optimizer, self.scale = network, optimizer, scale
        self.processes, self.grad_clip = processes, grad_clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skips_on_device = all(group.get("fused") for group in optimizer.param_groups)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients travel with the last one only."""
        no_sync = getattr(self.network, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this process's part of the objective (DDP averages over processes)."""
        loss = loss * self.processes
        (loss if self.scale is None else loss * self.scale.scale).backward()

    def step(self, learning_rate: float, measured: Mapping[str, Sequence[nn.Parameter]] = {}) -> Step:
        """Clip, update, clear. A step with a non-finite gradient norm changes nothing. `measured`: layers to give norms of."""
        _set_learning_rate(self.optimizer, learning_rate)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self.scale.scale)
        norm = get_total_norm(gradients)
        by_layer = {name: get_total_norm([p.grad for p in own if p.grad is not None]) for name, own in measured.items()}
        not_finite = (~torch.isfinite(norm)).float()
        if self.grad_clip:
            clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        if self.skips_on_device:
            self.optimizer.found_inf = not_finite  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not float(not_finite):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is None:
            return Step(norm, not_finite, by_layer)
        bad = not_finite * (self.scale.scale <= 1.0)
        self.scale.update(not_finite)
        return Step(norm, bad, by_layer)

    def loss_scale_state(self) -> dict[str, Any]:
        """Scale and growth count of fp16; empty otherwise."""
        return {} if self.scale is None else {"scale": float(self.scale.scale), "growth": int(self.scale.growth)}

    def restore_loss_scale(self, state: dict[str, Any]) -> None:
        """Continue with a saved scale (from either form)."""
        if self.scale is not None and state:
            self.scale = LossScale(self.scale.scale.device, state["scale"], int(state["growth"]))


class DeepSpeedUpdate:
    """ZeRO 1, 2 or 3. The engine is called directly, so that the learning rate is set between last backward and step."""

    def __init__(self, engine: Any, processes: int, accumulation: int) -> None:
        self.network, self.engine = engine, engine
        self.factor = processes * accumulation  # the engine averages over both
        if self._dynamic_scaler() is not None:
            self._dynamic_scaler().raise_error_at_min_scale = False  # bad steps are counted by us, and end in a message

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Any:
        """Around forward and backward of a micro-batch; `engine.step` advances the engine's own counters after it."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        """Accumulate, and on the last micro-batch reduce, the gradient of this process's part of the objective."""
        self.engine.backward(loss * self.factor)

    def step(self, learning_rate: float, measured: Mapping[str, Sequence[nn.Parameter]] = {}) -> Step:
        """The engine clips, updates and clears; it skips a step that is not finite (its own host reads).

        It keeps no whole gradients to give norms of: `measured` is empty.
        """
        _set_learning_rate(self.engine.optimizer, learning_rate)
        scaler = self._dynamic_scaler()
        scale_before = scaler.cur_scale if scaler else 0.0
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        norm = torch.as_tensor(math.inf if skipped else self.engine.get_global_grad_norm())
        return Step(norm, torch.tensor(float(skipped and scale_before <= 1.0)))

    def _dynamic_scaler(self) -> Any:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def loss_scale_state(self) -> dict[str, Any]:
        """Scale, growth count and hysteresis of fp16; empty otherwise."""
        scaler = self._dynamic_scaler()
        if scaler is None:
            return {}
        # DeepSpeed counts from the last overflow and doubles at each full window; we count from the last doubling.
        clean = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {"scale": scaler.cur_scale, "growth": clean, "hysteresis": scaler.cur_hysteresis}

    def restore_loss_scale(self, state: dict[str, Any]) -> None:
        """Continue with a saved scale (from either form)."""
        scaler = self._dynamic_scaler()
        if scaler is not None and state:
            scaler.cur_scale = state["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = int(state["growth"]), -1
            scaler.cur_hysteresis = state.get("hysteresis", scaler.delayed_shift)


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


class BadSteps:
    """Counts non-finite steps, reading each verdict one step late, when the device has long produced it."""

    def __init__(self, in_a_row: int = 0, total: int = 0) -> None:
        self.in_a_row, self.total, self.last_step = in_a_row, total, 0
        self._pending: tuple[Tensor, Any, int] | None = None

    def note(self, bad: Tensor, step: int) -> None:
        """Take the verdict of this step, and read that of the one before."""
        self.settle()
        if bad.device.type == "cpu":
            self._pending = (bad, None, step)
            return
        # `non_blocking` to the host goes through page-locked memory; the event says when it has arrived.
        copy, arrived = bad.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        self._pending = (copy, arrived, step)

    def settle(self) -> None:
        """Read the verdict that is still pending, if any."""
        if self._pending is None:
            return
        bad, arrived, step = self._pending
        if arrived is not None:
            arrived.synchronize()
        self._pending = None
        is_bad = bool(bad.item())
        self.total += is_bad
        self.in_a_row, self.last_step = (self.in_a_row + 1, step) if is_bad else (0, self.last_step)
