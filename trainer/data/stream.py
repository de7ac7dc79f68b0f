"""The stream of samples and its order.

The stream is endless and its positions are numbered: optimizer step t (counted from 0) with A micro-batches of B samples reads
positions t*A*B up to (t+1)*A*B. What a step reads depends on its number alone, not on processes, workers or evaluations; and to
resume at a step nothing has to be read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.data.seeding import hash32
from trainer.errors import UserError

BLOCK = 1024  # positions whose sample numbers are computed at once: with fewer each costs more, many would delay a step
ROUNDS = 4  # enough that a chi-squared test finds no preferred place or successor of an item, even in a set of five


def shuffled(places: np.ndarray, keys: np.ndarray, length: int) -> np.ndarray:
    """Shuffle places 0 .. length - 1 of an epoch: the item at each of `places`, int64 [n], under its epoch's key in `keys`,
    uint64 [n].

    For each key this is a bijection, computed for single places: a permutation kept as an array would take 8 bytes an item in
    every process. Items are the cells of a table of about sqrt(length) rows and columns. A Feistel network shifts the row by a
    hash of the column, and the column by a hash of the row; a result of `length` or more goes through it again, until it is
    below (Black & Rogaway 2002, "Ciphers with arbitrary finite domains": generalised Feistel, cycle walking).
    """
    rows = np.uint64(math.isqrt(length - 1) + 1)
    columns = np.uint64(-(-length // int(rows)))
    items = places.astype(np.uint64)
    outside = np.arange(len(items))
    while len(outside):
        (row, column), key = np.divmod(items[outside], columns), keys[outside]
        for _ in range(ROUNDS):
            key = _mix(key + GOLDEN)
            row = (row + _mix(key ^ column) % rows) % rows
            key = _mix(key + GOLDEN)
            column = (column + _mix(key ^ row) % columns) % columns
        items[outside] = row * columns + column
        outside = outside[items[outside] >= length]
    return items.astype(np.int64)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014, figure 17), on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_numbers(positions: Sequence[int] | np.ndarray, seed: int, length: int | None) -> np.ndarray:
    """Sample numbers at stream positions, int64 [n]. Of a finite set: epoch * length + item, each item once an epoch."""
    positions = np.asarray(positions, dtype=np.int64)
    if length is None:
        return positions
    epochs, places = np.divmod(positions, length)
    first, last = int(epochs.min()), int(epochs.max())
    keys = np.array([hash32("order", seed, epoch) for epoch in range(first, last + 1)], dtype=np.uint64)
    return epochs * length + shuffled(places, keys[epochs - first], length)


def share(batch_size: int, rank: int, processes: int) -> range:
    """The places of a micro-batch, of 0 .. batch_size - 1, that a process reads; shares differ by at most one place.

    Losses are divided by counts over all processes, so the split changes no curve. UserError for more processes than samples.
    """
    if processes > batch_size:
        raise UserError(
            f"batch_size {batch_size} does not reach for {processes} processes; use {batch_size} processes at most, or a "
            "larger --batch_size with fewer --gradient_accumulation_steps"
        )
    return range(rank * batch_size // processes, (rank + 1) * batch_size // processes)


class TrainingOrder:
    """Batch sampler: the sample numbers of this process's part of every micro-batch from `first_micro_batch` on, for ever.

    `length`: number of items of a finite set, None for a generated one. `repeated`: if not 0, read only the first `repeated`
    micro-batches of the stream, again and again.
    """

    def __init__(
        self,
        batch_size: int,
        rank: int,
        processes: int,
        seed: int,
        length: int | None,
        first_micro_batch: int,
        repeated: int = 0,
    ) -> None:
        self.batch_size, self.places = batch_size, np.array(share(batch_size, rank, processes))
        self.seed, self.length, self.first_micro_batch = seed, length, first_micro_batch
        self.repeated = repeated * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        count = max(1, BLOCK // len(self.places))  # micro-batches at a time
        own = (np.arange(count)[:, None] * self.batch_size + self.places).ravel()
        start = self.first_micro_batch * self.batch_size
        while True:
            positions = (start + own) % self.repeated if self.repeated else start + own
            yield from sample_numbers(positions, self.seed, self.length).reshape(count, -1).tolist()
            start += count * self.batch_size


class EvaluationOrder:
    """Batch sampler: samples 0 .. length - 1, each on one process. All processes have the same number of batches, since under
    ZeRO-3 every rank has to take part in every forward.

    A process without samples left for a batch reads sample 0 as a spare, which must not count: `counts` is 0 for that batch.
    """

    def __init__(self, length: int, batch_size: int, rank: int, processes: int) -> None:
        self.length, self.rank, self.part = length, rank, max(1, batch_size // processes)
        self.starts = range(0, length, self.part * processes)

    def _own(self) -> Iterator[range]:
        for start in self.starts:
            first = start + self.rank * self.part
            yield range(min(first, self.length), min(first + self.part, self.length))

    @property
    def counts(self) -> Iterator[int]:
        """The number of samples of this process that count, batch by batch."""
        return map(len, self._own())

    def __iter__(self) -> Iterator[list[int]]:
        return (list(numbers) or [0] for numbers in self._own())

    def __len__(self) -> int:
        return len(self.starts)


def length_of(dataset: Any) -> int | None:
    """Number of items of a finite set; None for a generated stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def describe(batch_size: int, accumulation: int, processes: int, total_steps: int, samples: int | None) -> Sequence[str]:
    """Lines for the start of a run: the batch arithmetic, and the planned steps, samples and epochs."""
    effective = batch_size * accumulation
    least, most = (len(share(batch_size, rank, processes)) for rank in (0, processes - 1))
    each = str(least) if least == most else f"{least} or {most}"
    lines = [
        f"Batch: {each} samples x {processes} process{'es' if processes > 1 else ''} x "
        f"{accumulation} accumulation = {effective} samples per optimizer step"
    ]
    if samples is not None:
        lines.append(
            f"Plan: {total_steps:,} optimizer steps = {total_steps * effective:,} samples = "
            f"{total_steps * effective / samples:.2f} epochs of {samples:,}"
        )
    else:
        lines.append(f"Plan: {total_steps:,} optimizer steps = {total_steps * effective:,} samples")
    return lines
