"""Exact evaluation: every sample once on any number of processes; sums and counts are reduced, and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    """What the processes tell each other before each batch: whether one of them cannot go on."""

    def cast(self, error: Exception | None) -> None:
        """This process's vote on the batch that it has read, or the error that came in its place."""

    def interrupted(self) -> bool:
        """Whether to end before that batch; the same on every process."""


class ErrorsAlone:
    """The votes outside training, where a process that cannot go on ends the others with it."""

    def cast(self, error: Exception | None) -> None:
        """Raise it, in words of its own where a sample cannot be read."""
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
    stop_requested: Callable[[], bool] = lambda: False,
    samples: int = 0,
    replaced: list[str] | None = None,
) -> dict[str, float] | None:
    """Means of what the recipe measures over `dataset` (its first `samples`, if that is not 0).

    `model` is the objective, prepared or bare. `batch_size` is per micro-step over all processes. Collective. None if the
    `votes` say so, which are cast while the batch before is computed (without them errors alone end it); they must where a
    process waits for data no longer because of its own `stop_requested()`. To `replaced` is added a line on each sample that
    another one stands for.
    """
    length = min(len(dataset), samples or len(dataset))
    order = EvaluationOrder(length, batch_size, launch.rank, launch.processes)
    batches = loader.read(dataset, order, run, launch.device, stop_requested)
    totals: dict[str, Tensor] = {}
    item_counts: dict[str, int] = {}
    votes, was_training = votes or ErrorsAlone(), model.training
    model.eval()

    def read_ahead() -> Any:
        batch: Any = None
        error: Exception | None = None
        try:
            batch = next(batches)
        except loader.StopWaiting:
            pass
        except torch.OutOfMemoryError:  # of a set that is generated on the device
            raise
        except Exception as reason:  # every rank has to hear of it
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
    names = list(totals)
    flat = [value for name in names for value in [*totals[name].tolist(), item_counts.get(name, 0)][:2]]
    sums = launch.control.sum(flat).wait()
    measured_sums = zip(names, sums[::2], sums[1::2], strict=True)
    means = {name: s / max(n, 1.0) for name, s, n in measured_sums if n or name not in recipe.monitored}
    return summarise(recipe, means, loss_weights)


def improves(value: float, before: float | None, direction: str) -> bool:
    """Whether `value` is finite and better than the best one before it; `direction`: is `lower` or `higher` better."""
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value < before if direction == "lower" else value > before
