"""What a process holds of a parameter and its moments under ZeRO: a stretch of their flattened numbers."""

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
    """Of a parameter `p` of DeepSpeed's: its master weight in fp32 (`key` None), or the moment of that key."""

    @abstractmethod
    def gather(self, p: Any, key: str | None, writer: int) -> Tensor | None:
        """The whole of it on rank `writer`. Collective."""

    @abstractmethod
    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """Set this process's part, as `own` gives it."""

    @abstractmethod
    def _stretch(self, p: Any) -> tuple[int, int]:
        """(first number, how many) of this process's part; it may end behind the last number."""

    def own(self, p: Any, read: Callable[[slice], Tensor]) -> Tensor:
        """This process's part, flat, of what has the shape of `p`, from the rows that it lies in."""
        shape, (start, length) = whole_shape(p), self._stretch(p)
        row = math.prod(shape[1:])
        first, last = start // row, min(shape[0], -(-(start + length) // row))
        return read(slice(first, last)).flatten()[start - first * row :][:length]


class Fragments(ZeroParts):
    """Stages 1 and 2: the flat partition of a process begins and ends within parameters."""

    def gather(self, p: Any, key: str | None, writer: int) -> Tensor:
        """Some ranks hold fragments of it."""
        if not p.requires_grad:
            return p
        whole = torch.zeros(p.numel(), device=p.device)
        if p._hp_mapping is not None:
            held = p._hp_mapping.lp_fragment_address
            whole[held.start : held.start + held.numel] = p._hp_mapping.get_hp_fragment(key)
        # Each number is on one rank, and zero bits on all others. As numbers -0.0 + 0.0 would be 0.0.
        dist.reduce(whole.view(torch.int32), dst=writer)
        return whole.view(p.shape)

    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """In place."""
        if len(own):
            p._hp_mapping.get_hp_fragment(key).copy_(own)

    def _stretch(self, p: Any) -> tuple[int, int]:
        if getattr(p, "_hp_mapping", None) is None:  # it is frozen, or another process's
            return 0, 0
        return p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel


class Shares(ZeroParts):
    """Stage 3: each parameter is cut into as many shares of one size as there are processes, the last padded."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def gather(self, p: Any, key: str | None, writer: int) -> Tensor | None:
        """Each rank sends its share."""
        from deepspeed import utils

        if key is not None:
            share = utils.safe_get_local_optimizer_state(p, key)
        else:
            share = utils.safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor  # frozen: no master copy
        share = share.data.to(self.launch.device)  # a frozen one that is offloaded lies on the host
        shares = share.new_empty(self.launch.processes, share.numel()) if self.launch.rank == writer else None
        dist.gather(share, None if shares is None else list(shares), dst=writer)
        return None if shares is None else shares.flatten()[: p.ds_numel].view(p.ds_shape)

    def put(self, p: Any, key: str | None, own: Tensor) -> None:
        """DeepSpeed's `safe_set_full_*` fails where shares are padded: hence the local form."""
        from deepspeed import utils

        padded = F.pad(own, (0, p.ds_tensor.ds_numel - len(own)))
        if key is None:
            utils.safe_set_local_fp32_param(p, padded)
        else:
            utils.safe_set_local_optimizer_state(p, padded, key)

    def _stretch(self, p: Any) -> tuple[int, int]:
        return p.ds_tensor.ds_numel * self.launch.rank, p.ds_tensor.ds_numel
