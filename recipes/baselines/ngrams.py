"""Unigram and Kneser-Ney bigram losses: what counting alone achieves, for scale beside a language model.

Kneser-Ney (Kneser & Ney 1995, "Improved backing-off for m-gram language modeling"), in the interpolated form
of Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling"), for context v:

    p(w | v) = max(c(v,w) - D, 0) / c(v)  +  D N(v,.) / c(v)  p_cont(w)          p(w | v) = p_cont(w) if c(v) = 0
    p_cont(w) = max(N(.,w) - D', 0) / N(.,.)  +  D' |{w: N(.,w) > 0}| / N(.,.)  1 / V

c counts occurrences in the training ids; N(v,.) counts the different tokens seen after v, N(.,w) those seen before w,
N(.,.) the different pairs. Each discount is n1 / (n1 + 2 n2), n1 and n2 being how many of the counts are 1 and 2. The
uniform part gives every id a probability above 0, and each distribution sums to 1.
"""

import numpy as np


def bigram_loss(train_ids: np.ndarray, eval_ids: np.ndarray, vocab_size: int, eval_mask: np.ndarray | None = None) -> float:
    """Mean nats per predicted token of a Kneser-Ney bigram: the loss of a language model on the same tokens.

    `train_ids` [train tokens] and `eval_ids` [eval tokens] are streams of ids below `vocab_size`. Every token of
    `eval_ids` but the first is predicted; `eval_mask` (bool, [eval tokens]) leaves out those where it is false, such as
    the first of each row. Raises ValueError where nothing is left to count or predict, or an id is too large.
    """
    model = KneserNeyBigram(train_ids, vocab_size)
    eval_ids = _checked(eval_ids, vocab_size, "eval_ids")
    return _mean_nats(model.log_probability(eval_ids[:-1], eval_ids[1:]), eval_mask)


def unigram_loss(train_ids: np.ndarray, eval_ids: np.ndarray, vocab_size: int, eval_mask: np.ndarray | None = None) -> float:
    """Mean nats per predicted token from frequencies alone, discounted as above; arguments as for `bigram_loss`."""
    counts = np.bincount(_checked(train_ids, vocab_size, "train_ids"), minlength=vocab_size)
    eval_ids = _checked(eval_ids, vocab_size, "eval_ids")
    return _mean_nats(np.log(_discounted(counts))[eval_ids[1:]], eval_mask)


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram over ids 0 ... vocab_size - 1, counted from one stream of ids [tokens]."""

    def __init__(self, train_ids: np.ndarray, vocab_size: int) -> None:
        ids = _checked(train_ids, vocab_size, "train_ids")
        # A pair is one integer, v * V + w: sorting counts them and a binary search finds them, without a dictionary.
        self.pairs, self.pair_counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        before, after = np.divmod(self.pairs, vocab_size)
        self.vocab_size = vocab_size
        self.discount = _discount(self.pair_counts)
        self.context_counts = np.bincount(ids[:-1], minlength=vocab_size)  # c(v)
        self.followers = np.bincount(before, minlength=vocab_size)  # N(v,.)
        self.continuation = _discounted(np.bincount(after, minlength=vocab_size))  # p_cont

    def log_probability(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """log p(token | context) in nats, elementwise: [n], [n] -> [n]."""
        keys = contexts.astype(np.int64) * self.vocab_size + tokens
        places = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == keys, self.pair_counts[places], 0)
        seen = self.context_counts[contexts]
        total = np.maximum(seen, 1)  # an unseen context divides 0 by 1, and below leaves everything to p_cont
        own = np.maximum(counts - self.discount, 0) / total
        left_over = np.where(seen > 0, self.discount * self.followers[contexts] / total, 1.0)
        return np.log(own + left_over * self.continuation[tokens])


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994); one half if no count is 1, which would reserve nothing."""
    once, twice = int(np.sum(counts == 1)), int(np.sum(counts == 2))
    return once / (once + 2 * twice) if once else 0.5


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Counts [vocab] -> probabilities [vocab]; what the discount takes away is spread evenly over all ids."""
    discount = _discount(counts)
    spread = discount * np.sum(counts > 0) / len(counts)
    return (np.maximum(counts - discount, 0) + spread) / counts.sum()


def _mean_nats(log_probability: np.ndarray, eval_mask: np.ndarray | None) -> float:
    if eval_mask is not None:
        log_probability = log_probability[np.asarray(eval_mask, dtype=bool)[1:]]
    if not len(log_probability):
        raise ValueError("eval_mask leaves no token to predict; the first token of the stream is never predicted")
    return float(-log_probability.mean())


def _checked(ids: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """The stream as int64 (pairs need 32 bits and more); ValueError if too short or an id is out of range."""
    if len(ids) < 2:
        raise ValueError(f"{name} has {len(ids)} tokens; a bigram needs at least 2")
    if ids.max() >= vocab_size:
        raise ValueError(f"{name} holds id {ids.max()}, not below vocab_size {vocab_size}; use the tokenizer's size")
    return ids.astype(np.int64)
