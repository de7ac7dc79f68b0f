"""Cross entropy of the next token from hidden states, without the logits of a whole batch in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 2**28
"""logits that are held at a time where nothing fuses them away: 1 GiB in fp32"""


Reduction = Literal["sum", "none"]


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Cross entropy in nats of `labels` under the logits hidden @ weight.T, summed over all labels but IGNORED, in fp32.

    hidden [..., width], weight [vocab, width], labels integers [...]; with the reduction "none" the loss of each label, [...],
    0 where it is IGNORED. A compiled graph reads the logits of the matrix product as they are; elsewhere they are made a chunk
    at a time, again in the backward pass, or GPT-2's would take 6 GiB in fp32 for 32 samples, three times over.
    """
    shape, hidden, labels = labels.shape, hidden.flatten(0, -2), labels.flatten()
    padding = -len(weight) % 128 if weight.is_cuda else 0
    vocab, weight = len(weight), F.pad(weight, (0, 0, 0, padding)) if padding else weight
    size = max(1, CHUNK_LOGITS // len(weight))
    if len(hidden) <= size or torch.compiler.is_compiling():
        loss = chunk_loss(hidden, weight, labels, vocab, reduction)
        return loss.view(shape) if reduction == "none" else loss
    chunks = zip(hidden.split(size), labels.split(size), strict=True)
    losses = [checkpoint(chunk_loss, h, weight, own, vocab, reduction, use_reentrant=False) for h, own in chunks]
    return torch.cat(losses).view(shape) if reduction == "none" else torch.stack(losses).sum()


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, reduction: Reduction = "sum") -> Tensor:
    """hidden [tokens, width], weight [at least vocab, width], labels [tokens]. Rows of the weight past `vocab` have no share.

    They are there because a GPU multiplies and reads rows of 50,304 logits much faster than rows of 50,257.
    """
    logits = F.linear(hidden, weight)
    if len(weight) > vocab:
        logits[:, vocab:] = -torch.inf  # before they are widened: a compiled graph would keep what it writes to in fp32
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction=reduction)


def loss_terms(loss: Callable[..., Tensor], source: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """{"next_token": loss()}; where `source` tells the set of each row, int64 [batch], also under the names of these sets the
    sums over their rows, which carry no gradient. `loss` is of a batch, and takes a `reduction`."""
    if source is None:
        return {"next_token": loss()}
    losses = loss(reduction="none")
    return {"next_token": losses.sum(), **sums_by_source(losses.detach(), source, names)}


def predicted_tokens(labels: Tensor, source: Tensor | None, names: Sequence[str]) -> dict[str, int]:
    """How many labels each of these terms is a sum over."""
    predicted = labels != IGNORED
    counts = {} if source is None else sums_by_source(predicted, source, names)
    return {"next_token": int(predicted.sum()), **{name: int(count) for name, count in counts.items()}}


def sums_by_source(values: Tensor, source: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """{name: the sum over the rows of values [batch, time] that are of this set}."""
    own = source[:, None] == torch.arange(len(names), device=source.device)
    # No product with `own`, through which one value that is not finite would reach the sums of all sets.
    sums = torch.where(own, values.sum(1)[:, None], 0).sum(0)
    return dict(zip(names, sums.unbind(), strict=True))
