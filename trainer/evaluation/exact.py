"""Exact evaluation: every sample once on any number of processes; sums and counts are reduced, and divided once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.command_line.sections import Run
from trainer.data import loader
from trainer.data.stream import EvaluationOrder
from trainer.distributed.launch import Launch
from trainer.evaluation.objective import summarise
from trainer.recipe import Recipe


def evaluate(
    model: nn.Module,
    recipe: Recipe,
    loss_weights: Mapping[str, float],
    dataset: Any,
    batch_size: int,
    run: Run,
    launch: Launch,
    interrupted: Callable[[], bool] = lambda: False,
    stop_requested: Callable[[], bool] = lambda: False,
    samples: int = 0,
) -> dict[str, float] | None:
    """Means of what the recipe measures over `dataset` (its first `samples`, if that is not 0).

    `model` is the objective, prepared or bare. `batch_size` is per micro-step over all processes. Collective. None if
    `interrupted()`, called before each batch, says so; it must answer the same on every process, and yes where one of them
    waits for data no longer because of its own `stop_requested()`.
    """
    length = min(len(dataset), samples or len(dataset))
    order = EvaluationOrder(length, batch_size, launch.rank, launch.processes)
    batches = loader.read(dataset, order, run, launch.device, stop_requested)
    totals: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for own_samples in order.counts:
                try:
                    batch = next(batches)
                except loader.StopWaiting:
                    batch = None
                if interrupted() or batch is None:
                    return None
                measured = model(loader.to_device(batch, launch.device), measuring=True)
                for name, pair in measured.items():
                    # A process that has run out of samples read a spare one: it takes part, and does not count.
                    counted = pair if own_samples else torch.zeros_like(pair)
                    totals[name] = totals.get(name, torch.zeros_like(pair)) + counted
    finally:
        model.train(was_training)
        loader.close(batches)
    names = list(totals)
    flat = [value for name in names for value in totals[name].tolist()]
    sums = launch.control.sum(flat).wait()
    means = {name: sums[2 * i] / max(sums[2 * i + 1], 1.0) for i, name in enumerate(names)}
    return summarise(recipe, means, loss_weights)
