"""Relative position bias as in Swin (Liu et al. 2021, eq. 4), with rows for a class token as in BEiT (Bao et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


class RelativePositionBias(nn.Module):
    """A learnt number per head and offset between two positions, added to the attention logits.

    Parameter `relative_position_bias_table` [offsets (+ 3 with a class token), heads]; buffer `relative_position_index`
    [N, N], the row of the table for each query and key. Two dimensions: offset (dh, dw) = query - key has row
    (dh + Wh - 1)(2 Ww - 1) + dw + Ww - 1; one dimension: row i - j + L - 1. With a class token (`prefix_tokens` 1, the first
    position) D offsets are followed by row D for class to patch, D + 1 for patch to class, D + 2 for class to class.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        num_heads: int,
        window_size: tuple[int, int] | None = None,
        seq_len: int | None = None,
        bias_type: str = "2d",
        init_std: float = INIT_STD,
        prefix_tokens: int = 0,
        learnable: bool = True,
    ) -> None:
        """`window_size` (patches down, across) for "2d", `seq_len` for "1d". ValueError where they do not go together."""
        super().__init__()
        if prefix_tokens not in (0, 1):
            raise ValueError(f"prefix_tokens {prefix_tokens}: there is one class token or none")
        if bias_type == "2d" and window_size is not None:
            patches = window_size[0] * window_size[1]
            if seq_len not in (None, patches):
                raise ValueError(f"seq_len {seq_len} is not the {patches} patches of window_size {tuple(window_size)}")
            self.offset_grid = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
            index = _offsets_2d(*window_size)
        elif bias_type == "1d" and seq_len is not None:
            self.offset_grid = (1, 2 * seq_len - 1)
            index = _offsets_1d(seq_len)
        elif bias_type in ("1d", "2d"):
            raise ValueError(f"bias_type {bias_type!r} needs {'window_size' if bias_type == '2d' else 'seq_len'}")
        else:
            raise ValueError(f"bias_type {bias_type!r} is neither '1d' nor '2d'")
        offsets = self.offset_grid[0] * self.offset_grid[1]
        if prefix_tokens:
            index = F.pad(index, (1, 0, 1, 0))
            index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        # Not saved: it follows from the sizes alone.
        self.register_buffer("relative_position_index", index, persistent=False)
        table = torch.empty(offsets + 3 * prefix_tokens, num_heads)
        self.relative_position_bias_table = nn.Parameter(table, requires_grad=learnable)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=init_std)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """[heads, N, N]: the bias of each query (row) and key (column), in `dtype` if that is given.

        A view into memory whose rows are a multiple of 8 long, which is what the attention kernels of a GPU read. Gradients
        of the pairs at one offset are summed in the precision of the table.
        """
        index = self.relative_position_index
        length = index.shape[0]
        padded = F.pad(index, (0, -length % 8))
        # Selected from the transposed table, the values come in the order of the result: no second copy to reorder them.
        values = self.relative_position_bias_table.t().index_select(1, padded.flatten())
        # Cast before slicing: a cast of a view makes it contiguous, without the padding.
        return values.to(dtype or values.dtype).view(-1, *padded.shape)[..., :length]

    def by_offset(self) -> Tensor:
        """The table without its class-token rows as [heads, 2 Wh - 1, 2 Ww - 1]: offset 0 in the middle."""
        rows, columns = self.offset_grid
        return self.relative_position_bias_table[: rows * columns].t().reshape(-1, rows, columns)


def _offsets_2d(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dh, dw = (place.flatten()[:, None] - place.flatten()[None, :] for place in (rows, columns))
    return (dh + height - 1) * (2 * width - 1) + dw + width - 1


def _offsets_1d(length: int) -> Tensor:
    position = torch.arange(length)
    return position[:, None] - position[None, :] + length - 1


def bias_arguments(kwargs: Mapping[str, Any], num_heads: int, grid: tuple[int, int], prefix_tokens: int) -> dict[str, Any]:
    """Arguments of RelativePositionBias, completed from the model; ValueError where `kwargs` do not fit it."""
    size = {"seq_len": grid[0] * grid[1]} if kwargs.get("bias_type") == "1d" else {"window_size": grid}
    arguments = {"num_heads": num_heads, "prefix_tokens": prefix_tokens, **size, **kwargs}
    window, length = arguments.get("window_size"), arguments.get("seq_len")
    if arguments["num_heads"] != num_heads:
        raise ValueError(f"rpb_kwargs num_heads {arguments['num_heads']} is not the model's num_heads {num_heads}")
    if window is not None and tuple(window) != grid:
        raise ValueError(f"rpb_kwargs window_size {tuple(window)} is not the patch grid {grid} of the images")
    if length not in (None, grid[0] * grid[1]):
        raise ValueError(f"rpb_kwargs seq_len {length} is not the {grid[0] * grid[1]} patches of the images")
    if arguments["prefix_tokens"] != prefix_tokens:
        raise ValueError(
            f"rpb_kwargs prefix_tokens {arguments['prefix_tokens']} is not the {prefix_tokens} that pool asks for; leave it out"
        )
    return arguments
