"""The stream of samples and its order.

Samples are numbered for ever: optimizer step t (counted from 0) with A micro-batches of B samples reads the stream positions
from t*A*B up to (t+1)*A*B. What a step sees follows from its number alone, so resuming costs nothing and no number of
processes, workers or evaluations can change it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.data.seeding import hash32
from trainer.errors import UserError


@functools.lru_cache(maxsize=2)  # a batch may run through the border of two epochs
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of a finite set in one epoch. RandomState, because its streams are frozen across numpy versions."""
    return np.random.RandomState(hash32("order", seed, epoch)).permutation(length)


def sample_numbers(positions: range, seed: int, length: int | None) -> list[int]:
    """Sample numbers at stream positions. Finite set: epoch * length + shuffled item, each item once per epoch."""
    if length is None:
        return list(positions)
    return [p - p % length + int(permutation(seed, p // length, length)[p % length]) for p in positions]


def share(batch_size: int, processes: int) -> int:
    """Samples per process of a micro-batch; UserError with the nearest sizes that divide."""
    if batch_size % processes:
        below, above = batch_size // processes * processes, -(-batch_size // processes) * processes
        sizes = f"{below} or {above}" if below else str(above)
        raise UserError(f"batch_size {batch_size} does not divide over {processes} processes; use {sizes}")
    return batch_size // processes


class TrainingOrder:
    """Batch sampler: the sample numbers of this process's part of every micro-batch, from `first_micro_batch` on, for ever."""

    def __init__(
        self, batch_size: int, rank: int, processes: int, seed: int, length: int | None, first_micro_batch: int
    ) -> None:
        self.batch_size, self.part, self.rank = batch_size, share(batch_size, processes), rank
        self.seed, self.length, self.first_micro_batch = seed, length, first_micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_micro_batch * self.batch_size + self.rank * self.part
        while True:
            yield sample_numbers(range(start, start + self.part), self.seed, self.length)
            start += self.batch_size


class EvaluationOrder:
    """Batch sampler: samples 0 .. length-1 split over the processes, each exactly once, the same number of batches on each.

    Where a process has nothing left (ZeRO-3 needs every rank in every forward) it reads sample 0; `counts` tells how many
    samples of each batch are its own, so that the spare ones are left out.
    """

    def __init__(self, length: int, batch_size: int, rank: int, processes: int) -> None:
        part = max(1, batch_size // processes)
        starts = range(0, length, part * processes)
        own = [range(min(s + rank * part, length), min(s + (rank + 1) * part, length)) for s in starts]
        self.counts = [len(numbers) for numbers in own]
        self._batches = [list(numbers) or [0] for numbers in own]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def length_of(dataset: Any) -> int | None:
    """Number of items of a finite set; None for a generated stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def describe(batch_size: int, accumulation: int, processes: int, total_steps: int, samples: int | None) -> Sequence[str]:
    """The batch arithmetic, in the lines printed at start."""
    effective = batch_size * accumulation
    lines = [
        f"Batch: {share(batch_size, processes)} samples x {processes} process{'es' if processes > 1 else ''} x "
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
