"""Exact evaluation: every sample once on any number of processes; sums and counts are reduced, and divided once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.command_line.sections import Run
from trainer.data import loader
from trainer.data.bad_samples import REPLACED, is_bad_sample, reason_of
from trainer.data.stream import EvaluationOrder
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.evaluation.objective import summarise
from trainer.recipe import Recipe


class Votes(Protocol):
    """How the processes agree, before each batch, whether to go on."""

    def stop_requested(self) -> bool:
        """Whether this process, which waits for a batch, has to stop waiting; it then votes to end the evaluation."""

    def cast(self, error: Exception | None) -> None:
        """Send this process's vote on the batch that it has just read; `error`: why it could not."""

    def interrupted(self) -> bool:
        """Wait for all votes: whether to end before that batch. The same on every process."""


class NoVotes:
    """Outside training: nobody asks to stop, and an error on one process ends the launch."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def cast(self, error: Exception | None) -> None:
        """Raise the error; a UserError where a sample cannot be read."""
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
    `votes` end it early; the vote on a batch is cast while the device computes the one before. Adds to `replaced` a line for
    each unreadable sample that another one replaced.
    """
    votes = votes or NoVotes()
    length = min(len(dataset), samples or len(dataset))
    order = EvaluationOrder(length, batch_size, launch.rank, launch.processes)
    batches = loader.read(dataset, order, run, launch.device, votes.stop_requested)
    totals: dict[str, Tensor] = {}
    item_counts: dict[str, int] = {}
    was_training = model.training
    model.eval()

    def read_ahead() -> Any:
        batch: Any = None
        error: Exception | None = None
        try:
            batch = next(batches)
        except loader.StopWaiting:
            pass
        except torch.OutOfMemoryError:  # a data set that generates on the device: not an unreadable batch
            raise
        except Exception as reason:  # raised on every rank once the votes are in
            error = reason
        votes.cast(error)
        return batch

    try:
        with torch.no_grad():
            ahead = read_ahead()
            for number, own_samples in enumerate(order.counts, start=1):
                batch = ahead
                if votes.interrupted() or batch is None:
                    return None
                lines = batch.pop(REPLACED, [])
                if replaced is not None and own_samples:
                    replaced += lines
                items = recipe.items(batch)  # on the host: in the forward it would wait for the device
                measured = model(loader.to_device(batch, launch.device), measuring=True)
                missing = [term for term in loss_weights if term not in measured and term not in recipe.monitored]
                if missing:
                    raise UserError(
                        f"measure gives {', '.join(measured)} without {', '.join(missing)}; give the loss terms as well"
                    )
                for name, numbers in measured.items():
                    # A process that has run out of samples read a spare one: it takes part, and does not count.
                    counted = numbers if own_samples else torch.zeros_like(numbers)
                    totals[name] = totals.get(name, torch.zeros_like(numbers)) + counted
                    if len(numbers) == 1:
                        item_counts[name] = item_counts.get(name, 0) + (items[name] if own_samples else 0)
                if number < len(order):
                    ahead = read_ahead()  # while the device still works
    finally:
        model.train(was_training)
        loader.close(batches)
    own: list[float] = []  # sum and count of each measure, one after the other
    for name, total in totals.items():
        own += total.tolist() if len(total) == 2 else [total.item(), item_counts[name]]
    sums = launch.control.sum(own).wait()
    measured_sums = zip(totals, sums[::2], sums[1::2], strict=True)
    means = {name: s / max(n, 1.0) for name, s, n in measured_sums if n or name not in recipe.monitored}
    return summarise(recipe, means, loss_weights)


def improves(value: float, before: float | None, direction: str) -> bool:
    """Whether `value` is finite and better than `before` (None: there is none); `direction`: `lower` or `higher` is better."""
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value < before if direction == "lower" else value > before
