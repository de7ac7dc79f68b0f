"""Causal attention, to all that is before or, by a mask, to what is before in the same document."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SMALLEST_FLEX_HEAD = 16  # width of the narrowest head that FlexAttention has a kernel for


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d_head)) v, each position attending to itself and those before that the `mask` lets it see.

    All [..., time, d_head]; with a mask of `document_mask` [batch, heads, time, d_head].
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return _flex_attention()(q, k, v, block_mask=mask)


def document_mask(positions: Tensor, d_head: int, dropout: float = 0.0) -> Tensor | BlockMask:
    """Lets a token see itself and those before it in its document. positions [batch, time]: of each in its own, from 0 on.

    For FlexAttention, which passes over what nobody sees, on a GPU; but it has no dropout. Else bool [batch, 1, time, time].
    """
    documents = (positions == 0).cumsum(1)
    if not (positions.is_cuda and d_head >= SMALLEST_FLEX_HEAD and dropout == 0):
        return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return block_mask(documents)


def block_mask(documents: Tensor) -> BlockMask:
    """The mask for FlexAttention. documents [batch, time]: the number of each token's."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, time = documents.shape
    return create_block_mask(visible, batch, None, time, time, device=documents.device)


def _flex_attention() -> Any:
    """As a part of the graph that is compiled, or compiled by itself: only a compiler makes one kernel of it."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
