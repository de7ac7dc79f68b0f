"""Cross entropy of the next token from hidden states, without the logits of a whole batch in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recipes.data.token_samples import IGNORED

CHUNK_LOGITS = 2**28
"""logits computed at a time outside a compiled graph: 1 GiB in fp32"""


Reduction = Literal["sum", "none"]


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Cross entropy in nats of `labels` under the logits hidden @ weight.T, summed over all labels but IGNORED, in fp32.

    hidden [..., width], weight [vocab, width], labels integers [...]. Reduction "none": the loss of each label, [...], 0 where
    it is IGNORED. A compiled graph fuses the cast to fp32 into the loss. Elsewhere logits are computed in chunks, and again in
    the backward pass: as a whole, those of 32 samples of GPT-2 would take 6 GiB in fp32, three times over.
    """
    shape, hidden, labels = labels.shape, hidden.flatten(0, -2), labels.flatten()
    padding = -len(weight) % 128 if weight.is_cuda else 0
    vocab, weight = len(weight), F.pad(weight, (0, 0, 0, padding)) if padding else weight
    size = max(1, CHUNK_LOGITS // len(weight))
    if len(hidden) <= size or torch.compiler.is_compiling():
        loss = chunk_loss(hidden, weight, labels, vocab, reduction)
        return loss.view(shape) if reduction == "none" else loss
    chunks = zip(hidden.split(size), labels.split(size), strict=True)
    losses = [checkpoint(chunk_loss, h, weight, ids, vocab, reduction, use_reentrant=False) for h, ids in chunks]
    return torch.cat(losses).view(shape) if reduction == "none" else torch.stack(losses).sum()


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, reduction: Reduction = "sum") -> Tensor:
    """`next_token_loss` of hidden [tokens, width], weight [vocab or more, width], labels [tokens].

    Rows of the weight past `vocab` are padding, of probability 0: a GPU multiplies and reads rows of 50,304 logits much faster
    than rows of 50,257.
    """
    logits = F.linear(hidden, weight)
    if len(weight) > vocab:
        logits[:, vocab:] = -torch.inf  # before the cast: a compiled graph would store fp32 logits in order to write to them
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction=reduction)


def loss_terms(loss: Callable[..., Tensor], source: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """{"next_token": loss()} of a batch; with `source` (int64 [batch]: the place of each row's set in `names`) also {name: the
    sum over the rows of that set}, without gradient. `loss` takes a `reduction`, as `next_token_loss` does."""
    if source is None:
        return {"next_token": loss()}
    losses = loss(reduction="none")
    return {"next_token": losses.sum(), **sums_by_source(losses.detach(), source, names)}


def predicted_tokens(labels: Tensor, source: Tensor | None, names: Sequence[str]) -> dict[str, int]:
    """How many labels each term of `loss_terms` is a sum over. The labels are still on the host, before every step: numpy takes
    less than half of torch's time for them."""
    predicted = labels.numpy() != IGNORED
    counts = {"next_token": int(np.count_nonzero(predicted))}
    if source is not None:
        by_source = sums_by_source(torch.from_numpy(predicted), source, names)
        counts |= {name: int(count) for name, count in by_source.items()}
    return counts


def sums_by_source(values: Tensor, source: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """{name: the sum of values [batch, time] over the rows of that set}."""
    own = source[:, None] == torch.arange(len(names), device=source.device)
    # Not a product with `own`: 0 x inf is NaN, so one bad value would reach the sums of all sets.
    sums = torch.where(own, values.sum(1)[:, None], 0).sum(0)
    return dict(zip(names, sums.unbind(), strict=True))
