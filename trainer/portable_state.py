"""Weights and optimizer state as plain named tensors, read from and written to a live model under any backend.

Names are those of the bare network; an optimizer tensor is called `{moment}.{parameter}`. Parameters come one at a time, so a
whole second copy never exists. `entries` and `restore_optimizer` are collective under ZeRO: every process calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP = "step"
"""name of the optimizer's own step count, a scalar: it falls behind the trainer's after a skipped step"""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint; `read` gives it in full, on any device: the live one where it is whole anyway."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """of the file, which `read` may differ from"""
    read: Callable[[], Tensor]
    collective: bool = False
    """whether every process has to call `read`"""

    @property
    def size_bytes(self) -> int:
        """Bytes it takes in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def saved_buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers a state_dict holds (not the ones registered with persistent=False)."""
    kept = network.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in network.named_buffers() if name in kept)


class PlainState:
    """One process, or DDP: everything is whole on every process."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, moments: Sequence[str]) -> None:
        self.network, self.optimizer, self.moments = network, optimizer, moments

    def model_entries(self) -> list[Entry]:
        """Parameters (fp32, tied ones once) and buffers."""
        entries = [_entry(name, p, torch.float32) for name, p in self.network.named_parameters()]
        return entries + [_entry(name, b, _saved_dtype(b)) for name, b in saved_buffers(self.network)]

    def optimizer_entries(self) -> list[Entry]:
        """Every moment by parameter, and the step count; empty before the first step."""
        state, entries, steps = self.optimizer.state, [], [0.0]
        for name, p in self.network.named_parameters():
            own = state.get(p, {})
            entries += [_entry(f"{m}.{name}", own[m], torch.float32) for m in self.moments if own.get(m) is not None]
            steps += [float(own["step"])] if "step" in own else []
        count = torch.tensor(max(steps))
        return [*entries, Entry(STEP, (), torch.float32, lambda: count)]

    def restore_optimizer(self, names: set[str], read: Callable[[str], Tensor]) -> None:
        """Take the moments that the checkpoint has (`names`), each read when its turn comes."""
        count = float(read(STEP)) if STEP in names else 0.0
        for name, p in self.network.named_parameters():
            found = {m: read(f"{m}.{name}").to(p.device) for m in self.moments if f"{m}.{name}" in names}
            if found and "exp_avg" in found:
                # Fused optimizers keep the count on the device of the parameter.
                found["step"] = torch.tensor(count, device=p.device)
            if found:
                self.optimizer.state[p] = found


def _entry(name: str, tensor: Tensor, dtype: torch.dtype) -> Entry:
    return Entry(name, tuple(tensor.shape), dtype, lambda: tensor)


def plain_entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Tensors that are whole on this process, by name, as they are."""
    return [_entry(name, tensor, tensor.dtype) for name, tensor in tensors.items()]


def _saved_dtype(buffer: Tensor) -> torch.dtype:
    return torch.float32 if buffer.is_floating_point() else buffer.dtype


class ZeroState:
    """DeepSpeed ZeRO 1, 2 or 3: parameters and moments in flat partitions. Made right after `prepare`, on a fresh run too.

    ZeRO-1 and 2 link moments to parameters after the *first group's* step, and never if the first step is skipped; so every
    partition is given its zero moments here, before DeepSpeed links them. The training curve is the same as without.
    """

    def __init__(self, network: nn.Module, optimizer: Any, moments: Sequence[str], processes: int, rank: int) -> None:
        self.network, self.moments, self.processes, self.rank = network, moments, processes, rank
        zero = optimizer.optimizer  # inside Accelerate's wrapper
        self.base = zero
        while hasattr(self.base, "optimizer"):
            self.base = self.base.optimizer
        self.stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self.partitions = zero.fp32_partitioned_groups_flat if self.stage3 else zero.single_partition_of_fp32_groups
        for flat in self.partitions:
            state = {m: torch.zeros_like(flat.data) for m in moments}
            self.base.state[flat] = {"step": torch.tensor(0.0, device=flat.device), **state} if "exp_avg" in moments else state
        if not self.stage3 and moments:
            zero._lazy_init_hp_params_optimizer_state()

    def model_entries(self) -> list[Entry]:
        """Parameters from the fp32 masters (tied ones once) and buffers."""
        entries = [
            Entry(name, _shape(p), torch.float32, lambda p=p: self._weight(p), True)
            for name, p in self.network.named_parameters()
        ]
        return entries + [_entry(name, b, _saved_dtype(b)) for name, b in saved_buffers(self.network)]

    def _weight(self, p: Tensor) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if p.requires_grad:
            return safe_get_full_fp32_param(p).view(_shape(p))
        with zero.GatheredParameters([p], enabled=self.stage3):  # frozen: no master copy
            return p.detach().clone() if self.stage3 else p

    def optimizer_entries(self) -> list[Entry]:
        """Every moment by parameter, and the step count."""
        from deepspeed.utils import safe_get_full_optimizer_state

        def read(p: Tensor, moment: str) -> Tensor:
            return safe_get_full_optimizer_state(p, moment).view(_shape(p))

        entries = [
            Entry(f"{m}.{name}", _shape(p), torch.float32, lambda p=p, m=m: read(p, m), True)
            for name, p in self.network.named_parameters()
            if p.requires_grad
            for m in self.moments
        ]
        count = torch.tensor(float(self.base.state[self.partitions[0]].get("step", 0.0)))
        return [*entries, Entry(STEP, (), torch.float32, lambda: count)]

    def restore_weights(self, names: set[str], read: Callable[[str], Tensor]) -> None:
        """Set the fp32 masters (DeepSpeed makes them from weights that pure bf16 has already rounded)."""
        for name, p in self.network.named_parameters():
            if p.requires_grad and name in names:
                self._set(p, read(name), None)

    def restore_optimizer(self, names: set[str], read: Callable[[str], Tensor]) -> None:
        """Take the moments that the checkpoint has (`names`), each read when its turn comes."""
        for name, p in self.network.named_parameters():
            for moment in self.moments:
                if p.requires_grad and f"{moment}.{name}" in names:
                    self._set(p, read(f"{moment}.{name}"), moment)
        if STEP in names and "exp_avg" in self.moments:
            count = float(read(STEP))
            for flat in self.partitions:
                self.base.state[flat]["step"] = torch.tensor(count, device=flat.device)

    def _set(self, p: Any, value: Tensor, moment: str | None) -> None:
        from deepspeed import utils

        if not self.stage3:
            utils.safe_set_full_fp32_param(p, value) if moment is None else utils.safe_set_full_optimizer_state(
                p, value, moment
            )
            return
        # safe_set_full_* fails where the size is not a multiple of the number of processes: pad, and cut our own slice.
        held = p.ds_tensor
        n = held.ds_numel if hasattr(held, "ds_numel") else held.numel()
        padded = F.pad(value.flatten(), (0, n * self.processes - value.numel()))
        mine = padded[n * self.rank : n * (self.rank + 1)]
        if moment is None:
            utils.safe_set_local_fp32_param(p, mine)
        else:
            utils.safe_set_local_optimizer_state(p, mine, moment)


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))
