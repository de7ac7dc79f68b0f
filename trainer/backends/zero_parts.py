"""What a process holds of parameters and moments under ZeRO, which flattens them: put together for a file, or cut from one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.backends import tensors
from trainer.initial_weights import ALL_ROWS


def from_shares(p: Any, key: str | None, writer: int) -> Tensor | None:
    """Stage 3: a master weight (key None) or a moment, on `writer` alone; it lies on all ranks in shares of one size, the last
    padded. Collective."""
    from deepspeed import utils

    if key is not None:
        share = utils.safe_get_local_optimizer_state(p, key)
    else:
        share = utils.safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor  # frozen: no master copy
    shares = share.new_empty(dist.get_world_size(), share.numel()) if dist.get_rank() == writer else None
    dist.gather(share.data, None if shares is None else list(shares), dst=writer)
    return None if shares is None else shares.flatten()[: p.ds_numel].view(p.ds_shape)


def from_fragments(p: Any, key: str | None, writer: int) -> Tensor:
    """Stages 1 and 2: the same, on `writer`; some ranks hold fragments of it. Collective."""
    if not p.requires_grad:
        return p
    whole = torch.zeros(p.numel(), device=p.device)
    if p._hp_mapping is not None:
        held = p._hp_mapping.lp_fragment_address
        whole[held.start : held.start + held.numel] = p._hp_mapping.get_hp_fragment(key)
    # Each number is on one rank, and zero bits on all others. As numbers -0.0 + 0.0 would be 0.0.
    dist.reduce(whole.view(torch.int32), dst=writer)
    return whole.view(p.shape)


def set_part(p: Any, own: Tensor, key: str | None, stage3: bool) -> None:
    """Set this process's part (`own_part`) of a parameter's master weight (key None) or of a moment."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if not stage3:
        if len(own):
            p._hp_mapping.get_hp_fragment(key).copy_(own)
        return
    # safe_set_full_* fails where the size is not a multiple of the number of processes: hence the local form, padded.
    padded = F.pad(own, (0, p.ds_tensor.ds_numel - len(own)))
    if key is None:
        safe_set_local_fp32_param(p, padded)
    else:
        safe_set_local_optimizer_state(p, padded, key)


def own_part(p: Any, read: Callable[[slice], Tensor], stage3: bool) -> Tensor:
    """What this process holds of a flattened parameter, or of a moment of it, from the rows that this lies in."""
    shape, start, length = tensors.whole_shape(p), 0, 0
    if stage3:
        start, length = p.ds_tensor.ds_numel * dist.get_rank(), p.ds_tensor.ds_numel
    elif getattr(p, "_hp_mapping", None) is not None:  # else it is frozen, or another process's
        start, length = p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel
    if 0 in (len(shape), *shape):
        return read(ALL_ROWS).flatten()[start : start + length]
    row = math.prod(shape[1:])
    first, last = start // row, min(shape[0], -(-(start + length) // row))
    return read(slice(first, last)).flatten()[start - first * row :][:length]
