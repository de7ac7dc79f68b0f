"""The stream of samples, and the loader that reads this process's part of it.

Samples are numbered for ever: optimizer step t (counted from 0) with A micro-batches of B samples reads the stream positions
from t*A*B up to (t+1)*A*B. What a step sees follows from its number alone, so resuming costs nothing and no number of
processes, workers or evaluations can change it.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from trainer.errors import Refusal
from trainer.recipe import Batch
from trainer.sections import Run
from trainer.signals import reset_in_worker


def hash32(*parts: object) -> int:
    """32 well-mixed bits of `parts`: CPU generators use no more, and sums like a*step+rank collide."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


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
    """Samples per process of a micro-batch; Refusal with the nearest sizes that divide."""
    if batch_size % processes:
        below, above = batch_size // processes * processes, -(-batch_size // processes) * processes
        sizes = f"{below} or {above}" if below else str(above)
        raise Refusal(f"batch_size {batch_size} does not divide over {processes} processes; use {sizes}")
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
        mine = [range(min(s + rank * part, length), min(s + (rank + 1) * part, length)) for s in starts]
        self.counts = [len(numbers) for numbers in mine]
        self._batches = [list(numbers) or [0] for numbers in mine]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def identity(batch: Batch) -> Batch:
    """Collate function: `__getitems__` gives whole batches."""
    return batch


def read(dataset: Any, order: Any, run: Run, device: torch.device) -> Iterator[Batch]:
    """Batches of `dataset` in `order`, through a DataLoader; from the data set itself if that has nothing to do.

    It has where there are worker processes, or page-locked memory to copy to.
    """
    pinned, on_device = run.pin_memory and device.type == "cuda", getattr(dataset, "on_device", False)
    if on_device:
        dataset.to(device)
    if on_device or not (run.num_workers or pinned):
        return (dataset.__getitems__(numbers) for numbers in order)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=identity,
        num_workers=run.num_workers,
        prefetch_factor=run.prefetch_factor if run.num_workers else None,
        pin_memory=pinned,
        multiprocessing_context=_worker_context() if run.num_workers else None,
        worker_init_fn=reset_in_worker,
        # An iterator draws a seed when it is made; from a generator of its own, so that it does not shift dropout.
        generator=torch.Generator(),
    )
    return iter(loader)


def _worker_context() -> BaseContext:
    """How workers are started: from a clean server process, see `trainer.worker_server`. Data sets have to be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "trainer.worker_server"])
    return context


def close(batches: Iterator[Batch]) -> None:
    """End the worker processes of `read` now, rather than when the interpreter gets to it."""
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


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
