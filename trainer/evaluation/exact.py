"""Exact evaluation: every sample counts once on any number of processes. Sums and counts are reduced, then divided once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.command_line.sections import Run
from trainer.data import loader
from trainer.data.bad_samples import REPLACED, is_bad_sample, reason_of
from trainer.data.stream import EvaluationOrder
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.evaluation.objective import summarise
from trainer.recipe import Recipe


class Votes(Protocol):
    """How the processes agree, before each batch, whether to go on."""

    def stop_requested(self) -> bool:
        """Whether this process is to wait for its batch no longer. Its vote then ends the evaluation."""

    def cast(self, error: Exception | None) -> None:
        """Start to send this process's vote on the batch that it has just read; `error`: why it could not be read."""

    def interrupted(self) -> bool:
        """Wait for all votes on that batch: whether to end before it. The same on every process."""


class NoVotes:
    """For evaluation outside training, which nobody stops; an error on one process ends the launch."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def cast(self, error: Exception | None) -> None:
        """Raise `error`, if there is one; as a UserError if it is about an unreadable sample."""
        if error is not None:
            if not is_bad_sample(error):
                raise error
            raise UserError(f"reading data failed: {reason_of(error)}; mend the data") from error

    def interrupted(self) -> bool:
        """Never."""
        return False


def evaluate(
    model: nn.Module,
    recipe: Recipe,
    loss_weights: Mapping[str, float],
    dataset: Any,
    batch_size: int,
    run: Run,
    launch: Launch,
    votes: Votes | None = None,
    samples: int = 0,
    replaced: list[str] | None = None,
) -> dict[str, float] | None:
    """Means of what the recipe measures over `dataset` (its first `samples`; 0: all). Collective.

    `model`: the objective, prepared or bare. `batch_size`: samples of one forward pass over all processes. Returns None if the
    `votes` end it early. Adds to `replaced` a line for each unreadable sample that another one replaced.
    """
    votes = votes or NoVotes()
    length = min(len(dataset), samples or len(dataset))
    order = EvaluationOrder(length, batch_size, launch.rank, launch.processes)
    batches = loader.read(dataset, order, run, launch.device, votes.stop_requested)
    sums = _Sums()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ahead = _read(batches, votes)
            for number, own_samples in enumerate(order.counts, start=1):
                batch = ahead
                if votes.interrupted() or batch is None:
                    return None
                lines = batch.pop(REPLACED, [])
                if replaced is not None and own_samples:
                    replaced += lines
                items = recipe.items(batch)  # before the batch is on the device, where counting would wait for it
                measured = model(loader.to_device(batch, launch.device), measuring=True)
                missing = [term for term in loss_weights if term not in measured and term not in recipe.monitored]
                if missing:
                    raise UserError(
                        f"measure gives {', '.join(measured)} without {', '.join(missing)}; give the loss terms as well"
                    )
                sums.add(measured, items, own_samples)
                if number < len(order):
                    ahead = _read(batches, votes)  # while the device computes
    finally:
        model.train(was_training)
        loader.close(batches)
    reduced = sums.over_all_processes(launch.control)
    means = {name: s / max(n, 1.0) for name, (s, n) in reduced.items() if n or name not in recipe.monitored}
    return summarise(recipe, means, loss_weights)


def _read(batches: Iterator[Any], votes: Votes) -> Any:
    """The next batch, or None if it could not be read; casts the vote on it."""
    batch: Any = None
    error: Exception | None = None
    try:
        batch = next(batches)
    except loader.StopWaiting:
        pass
    except torch.OutOfMemoryError:  # of a data set that generates on the device: not an unreadable batch
        raise
    except Exception as reason:  # raised on every process once the votes are in
        error = reason
    votes.cast(error)
    return batch


class _Sums:
    """Sums and counts of all measures over this process's batches. The sums stay on the device until they are reduced."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        """[sum, count], or [sum] for a loss term, which `items` counts"""
        self.item_counts: dict[str, int] = {}

    def add(self, measured: Mapping[str, Tensor], items: Mapping[str, int], own_samples: int) -> None:
        """Add what `Objective` measures on a batch. Without `own_samples` the batch is a spare sample, and does not count."""
        for name, numbers in measured.items():
            counted = numbers if own_samples else torch.zeros_like(numbers)
            self.totals[name] = self.totals.get(name, torch.zeros_like(numbers)) + counted
            if len(numbers) == 1:
                self.item_counts[name] = self.item_counts.get(name, 0) + (items[name] if own_samples else 0)

    def over_all_processes(self, control: Control) -> dict[str, tuple[float, float]]:
        """{measure: (sum, count)} over all processes."""
        own: list[float] = []  # sum and count of each measure in turn
        for name, total in self.totals.items():
            own += total.tolist() if len(total) == 2 else [total.item(), self.item_counts[name]]
        reduced = control.sum(own).wait()
        return dict(zip(self.totals, zip(reduced[::2], reduced[1::2], strict=True), strict=True))


def improves(value: float, before: float | None, direction: str) -> bool:
    """Whether `value` is finite and better than `before`, if any. `direction` says which is better: `lower` or `higher`."""
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value < before if direction == "lower" else value > before
