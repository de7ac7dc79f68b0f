"""Which part of a parameter and its moments a process holds under ZeRO: a range of the flattened elements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.backends.tensors import whole_shape
from trainer.distributed.launch import Launch


class ZeroParts(ABC):
    """Reads and writes DeepSpeed's partitions of a parameter `p`: its fp32 master weight (`key` None), or the moment `key`."""

    @abstractmethod
    def gather(self, p: Any, key: str | None, writer: int) -> Tensor | None:
        """The whole tensor, on rank `writer`; elsewhere the result means nothing. Collective."""

    @abstractmethod
    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """Write this process's part, flat as `own` returns it."""

    @abstractmethod
    def _stretch(self, p: Any) -> tuple[int, int]:
        """(first element, how many) of this process's part of the flattened parameter; padding may reach beyond its end."""

    def own(self, p: Any, read: Callable[[slice], Tensor]) -> Tensor:
        """This process's part, flat, of a tensor of the shape of `p`; `read` is called for the rows that the part lies in."""
        shape, (start, length) = whole_shape(p), self._stretch(p)
        row = math.prod(shape[1:])
        first, last = start // row, min(shape[0], -(-(start + length) // row))
        return read(slice(first, last)).flatten()[start - first * row :][:length]


class Fragments(ZeroParts):
    """Stages 1 and 2: parameters are joined and cut into partitions, which may begin and end in the middle of a parameter."""

    def gather(self, p: Any, key: str | None, writer: int) -> Tensor:
        """Sums the fragments of all ranks, each padded with zeros."""
        if not p.requires_grad:
            return p
        whole = torch.zeros(p.numel(), device=p.device)
        if p._hp_mapping is not None:
            held = p._hp_mapping.lp_fragment_address
            whole[held.start : held.start + held.numel] = p._hp_mapping.get_hp_fragment(key)
        # Each element is on one rank, and zero bits on all others. Summed as integers: as floats -0.0 + 0.0 would give 0.0.
        dist.reduce(whole.view(torch.int32), dst=writer)
        return whole.view(p.shape)

    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """Into the fragment, if this process holds one."""
        if len(own):
            p._hp_mapping.get_hp_fragment(key).copy_(own)

    def _stretch(self, p: Any) -> tuple[int, int]:
        if getattr(p, "_hp_mapping", None) is None:  # frozen, or held by other processes alone
            return 0, 0
        return p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel


class Shares(ZeroParts):
    """Stage 3: each parameter is cut into one share per process, all of one size, the last one padded."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def gather(self, p: Any, key: str | None, writer: int) -> Tensor | None:
        """Every rank sends its share to `writer`."""
        from deepspeed import utils

        if key is not None:
            share = utils.safe_get_local_optimizer_state(p, key)
        else:
            share = utils.safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor  # frozen: no master copy
        share = share.data.to(self.launch.device)  # an offloaded frozen parameter is on the host
        shares = share.new_empty(self.launch.processes, share.numel()) if self.launch.rank == writer else None
        dist.gather(share, None if shares is None else list(shares), dst=writer)
        return None if shares is None else shares.flatten()[: p.ds_numel].view(p.ds_shape)

    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """With the local form of DeepSpeed's setters: `safe_set_full_*` fails where shares are padded."""
        from deepspeed import utils

        padded = F.pad(own, (0, p.ds_tensor.ds_numel - len(own)))
        if key is None:
            utils.safe_set_local_fp32_param(p, padded)
        else:
            utils.safe_set_local_optimizer_state(p, padded, key)

    def _stretch(self, p: Any) -> tuple[int, int]:
        return p.ds_tensor.ds_numel * self.launch.rank, p.ds_tensor.ds_numel
