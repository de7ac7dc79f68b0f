"""Cross entropy of the next token from hidden states, without the logits of a whole batch in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 2**28
"""logits that are held at a time where nothing fuses them away: 1 GiB in fp32"""


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats of `labels` under the logits hidden @ weight.T, summed over all labels but IGNORED, in fp32.

    hidden [..., width], weight [vocab, width], labels integers [...]. A compiled graph reads the logits of the matrix product
    as they are; elsewhere they are made a chunk at a time, again in the backward pass, or GPT-2's would take 6 GiB in fp32 for
    32 samples, three times over.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    padding = -len(weight) % 128 if weight.is_cuda else 0
    vocab, weight = len(weight), F.pad(weight, (0, 0, 0, padding)) if padding else weight
    size = max(1, CHUNK_LOGITS // len(weight))
    if len(hidden) <= size or torch.compiler.is_compiling():
        return chunk_loss(hidden, weight, labels, vocab)
    chunks = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.stack([checkpoint(chunk_loss, h, weight, own, vocab, use_reentrant=False) for h, own in chunks]).sum()


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """hidden [tokens, width], weight [at least vocab, width], labels [tokens]. Rows of the weight past `vocab` have no share.

    They are there because a GPU multiplies and reads rows of 50,304 logits much faster than rows of 50,257.
    """
    logits = F.linear(hidden, weight)
    if len(weight) > vocab:
        logits[:, vocab:] = -torch.inf  # before they are widened: a compiled graph would keep what it writes to in fp32
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
