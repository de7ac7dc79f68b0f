"""Windows of token ids, to train a language model on and to measure it with.

Batches of a mixture have "source", the set of each sample, int64 [batch]. With an `end_of_text`, the last id of every document,
they have "positions", that of each id in its document, int32 [batch, length + 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.data.splitmix64 import INCREMENT, mix
from recipes.data.token_samples import IGNORED, by_document, positions_in_documents
from recipes.data.token_sets import Mixture, TokenSet

if TYPE_CHECKING:
    import torch


class TokenWindows:
    """Windows of `length` inputs and the id after each, end to end: every id but the first is predicted once.

    The last window may be short. Windows are numbered so that the first n, for any n, are spread evenly over the ids: an
    evaluation of some of them is one of the whole text. `limit` keeps only so many.
    """

    def __init__(self, ids: TokenSet, length: int, limit: int | None = None, end_of_text: int | None = None) -> None:
        self.ids, self.length, self.end_of_text = ids, length, end_of_text
        self.windows = -(-(ids.count - 1) // length)
        self.limit = min(limit or self.windows, self.windows)
        self.stride = _spreading_stride(self.windows)

    def __len__(self) -> int:
        return self.limit

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> {"tokens": int32 [batch, length + 1]}, IGNORED where the file has ended."""
        starts = np.asarray(numbers, dtype=np.int64) % self.limit * self.stride % self.windows * self.length
        last = self.ids.count - self.length - 1
        tokens = self.ids.windows(self.length + 1, np.minimum(starts, last))
        for row in np.flatnonzero(starts > last):
            real = self.ids.count - int(starts[row])
            tokens[row, :real] = tokens[row, -real:].copy()
            tokens[row, real:] = IGNORED
        return _batch(tokens, self.end_of_text)


class RandomWindows:
    """An endless stream of windows. The set that sample s is drawn from, and its start there, are hashes of (seed, s).

    Sets are drawn by their shares, starts with equal probability. A hash is output s of a SplitMix64 generator.
    """

    def __init__(self, mixture: Mixture, length: int, seed: int, end_of_text: int | None = None) -> None:
        self.mixture, self.length, self.end_of_text = mixture, length, end_of_text
        seeds = np.array([seed], dtype=np.uint64) * INCREMENT
        self.state, self.set_state = mix(seeds + INCREMENT), mix(seeds + INCREMENT // 2)
        self.bounds = np.cumsum(mixture.shares)[:-1]

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> {"tokens": int32 [batch, length + 1]}: `length` inputs and the id after each."""
        tokens, source = self.drawn(numbers)
        return _batch(tokens, self.end_of_text) | source

    def drawn(self, numbers: Sequence[int]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """(the ids of each sample, int32 [batch, length + 1]; {"source": its set}, or {} if there is only one)."""
        import torch

        sets, starts = self.places(numbers)
        if len(self.mixture.sets) == 1:
            return self.mixture.sets[0].windows(self.length + 1, starts), {}
        tokens = np.empty((len(numbers), self.length + 1), np.int32)
        for number in np.unique(sets):
            chosen = sets == number
            tokens[chosen] = self.mixture.sets[number].windows(self.length + 1, starts[chosen])
        return tokens, {"source": torch.from_numpy(sets)}

    def places(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the set of each sample, int64 [batch]; the position of its first id there, from 0 to count - length - 1)."""
        steps = np.asarray(numbers, dtype=np.uint64) * INCREMENT
        counts = np.array([part.count - self.length for part in self.mixture.sets], dtype=np.uint64)
        sets = self.sets(numbers)
        # 64 random bits modulo at most 2^40 starts: probabilities of starts differ by less than one part in 2^24.
        return sets, (mix(self.state + steps) % counts[sets]).astype(np.int64)

    def sets(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The set of each sample, int64 [batch]."""
        steps = np.asarray(numbers, dtype=np.uint64) * INCREMENT
        return np.searchsorted(self.bounds, mix(self.set_state + steps) / 2.0**64, side="right")


class FixedWindows(RandomWindows):
    """The first `limit` samples of such a stream, to evaluate on the training sets of a mixture."""

    def __init__(self, mixture: Mixture, length: int, seed: int, limit: int, end_of_text: int | None = None) -> None:
        super().__init__(mixture, length, seed, end_of_text)
        self.limit = limit

    def __len__(self) -> int:
        return self.limit


class RandomBlocks(RandomWindows):
    """Random windows, in batches of the same form as `TokenBlocks`."""

    def __init__(self, mixture: Mixture, length: int, seed: int, end_of_text: int | None = None) -> None:
        """ValueError for a set without a whole window, and as of `TokenFile.check`."""
        super().__init__(mixture, length, seed, end_of_text)
        mixture.digests(length + 1)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> batch, int64 [batch, length] each."""
        import torch

        ids, source = self.drawn(numbers)
        tokens = torch.from_numpy(ids.astype(np.int64))
        return by_document({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, self.end_of_text) | source


class SharesSoFar:
    """The share of the samples so far that each set of a mixture gave. It follows from their numbers: no state to save."""

    def __init__(self, windows: RandomWindows) -> None:
        self.windows, self.samples = windows, 0
        self.counts = np.zeros(len(windows.mixture.sets), dtype=np.int64)

    def at(self, samples: int) -> dict[str, float]:
        """{label of a set: its share} of the first `samples` samples."""
        if samples < self.samples:
            self.samples, self.counts = 0, np.zeros_like(self.counts)
        for start in range(self.samples, samples, 1 << 16):
            sets = self.windows.sets(np.arange(start, min(samples, start + (1 << 16))))
            self.counts += np.bincount(sets, minlength=len(self.counts))
        self.samples = samples
        return dict(zip(self.windows.mixture.labels, (self.counts / max(1, samples)).tolist(), strict=True))


def _batch(tokens: np.ndarray, end_of_text: int | None) -> dict[str, torch.Tensor]:
    import torch

    batch = {"tokens": torch.from_numpy(tokens)}
    return batch if end_of_text is None else batch | {"positions": positions_in_documents(batch["tokens"], end_of_text)}


def _spreading_stride(count: int) -> int:
    """A step whose multiples modulo `count` visit every window, and at any time are spread evenly: it has no factor in common
    with `count`, and, of those near count / golden ratio, the smallest largest partial quotient of step / count (Niederreiter
    1992, section 3.1)."""
    near = round(count * 0.6180339887498949)
    candidates = [step for step in range(max(1, near - 100), min(near + 101, count)) if math.gcd(step, count) == 1]
    return min(candidates, key=lambda step: (_largest_quotient(step, count), abs(step - near)), default=1)


def _largest_quotient(step: int, count: int) -> int:
    """The largest partial quotient of the continued fraction of step / count."""
    largest = 0
    while step:
        largest = max(largest, count // step)
        step, count = count % step, step
    return largest
