"""Causal attention over the whole sequence or, with a mask, within each document."""

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
    """softmax(q k^T / sqrt(d_head)) v, each position attending to itself and to those before it that the `mask` allows.

    q, k, v and the result: [..., time, d_head]; with a mask from `document_mask` [batch, heads, time, d_head].
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return _flex_attention()(q, k, v, block_mask=mask)


def document_mask(positions: Tensor, d_head: int, dropout: float = 0.0) -> Tensor | BlockMask:
    """The mask of tokens that attend to themselves and those before them in their document, from the `positions` [batch, time]
    of tokens in their documents, counted from 0.

    On a GPU for FlexAttention, which skips masked blocks but has no dropout; otherwise bool [batch, 1, time, time].
    """
    documents = (positions == 0).cumsum(1)
    if not (positions.is_cuda and d_head >= SMALLEST_FLEX_HEAD and dropout == 0):
        return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return block_mask(documents)


def block_mask(documents: Tensor) -> BlockMask:
    """The mask for FlexAttention. documents [batch, time]: the number of each token's document."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch, time = documents.shape
    return create_block_mask(visible, batch, None, time, time, device=documents.device)


def _flex_attention() -> Any:
    """FlexAttention, compiled as part of the graph around it or else by itself: uncompiled it is not one kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
