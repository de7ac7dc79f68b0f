"""Exact evaluation: every sample once on any number of processes; sums and counts are reduced, and divided once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer import batches
from trainer.errors import Refusal
from trainer.launch import Launch
from trainer.recipe import Batch, Recipe, move
from trainer.sections import Run


class Objective(nn.Module):
    """Network and loss in one module, so that DDP, ZeRO and torch.compile see the loss inside `forward`.

    Only scalars leave it: Accelerate upcasts what a prepared module returns, and logits would be gigabytes.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, terms: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.terms = list(terms)
        self.config = getattr(network, "config", None)  # where DeepSpeed looks for hidden_size when a bucket is "auto"

    def forward(self, batch: Batch, measuring: bool = False) -> Any:
        """Loss sums [terms]; with `measuring` {name: [sum, count]} in float64."""
        if not measuring:
            sums = self.recipe.loss(self.network, batch)
            if sums.keys() != set(self.terms):
                raise Refusal(f"loss gives the terms {', '.join(sums)}, items counts {', '.join(self.terms)}; name the same")
            return torch.stack([sums[term].float() for term in self.terms])
        return {name: _pair(total, count) for name, (total, count) in self.recipe.measure(self.network, batch).items()}


def _pair(total: Tensor | float, count: Tensor | float) -> Tensor:
    total = torch.as_tensor(total)
    return torch.stack([total.double(), torch.as_tensor(count, device=total.device).double()])


def evaluate(
    model: nn.Module,
    recipe: Recipe,
    weights: Mapping[str, float],
    dataset: Any,
    batch_size: int,
    run: Run,
    launch: Launch,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means of what the recipe measures over `dataset` (its first `eval_iters` batches, if that is not 0).

    `model` is the objective, prepared or bare. `batch_size` is per micro-step over all processes. Collective. None if
    `interrupted()`, asked before each batch, says so; it must answer the same on every process.
    """
    length = len(dataset) if not run.eval_iters else min(len(dataset), run.eval_iters * batch_size)
    order = batches.EvaluationOrder(length, batch_size, launch.rank, launch.processes)
    reader = batches.read(dataset, order, run, launch.device)
    totals: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for count, batch in zip(order.counts, reader, strict=True):
                if interrupted():
                    return None
                measured = model(move(batch, launch.device), measuring=True)
                for name, pair in measured.items():
                    # A process that has run out of samples read a spare one: it takes part, and does not count.
                    totals[name] = totals.get(name, torch.zeros_like(pair)) + (pair if count else 0 * pair.nan_to_num())
    finally:
        model.train(was_training)
        batches.close(reader)
    names = list(totals)
    flat = [value for name in names for value in totals[name].tolist()]
    sums = launch.control.sum(flat).wait()
    means = {name: sums[2 * i] / max(sums[2 * i + 1], 1.0) for i, name in enumerate(names)}
    return summarise(recipe, means, weights)


def summarise(recipe: Recipe, means: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """`loss` (the weighted objective), each term where there are several, other measures, and what derives from them."""
    terms = [name for name in means if name in weights and name not in recipe.monitored]
    result = {name: value for name, value in means.items() if name not in terms}
    if terms:
        result = {"loss": sum(weights[t] * means[t] for t in terms), **result}
    if len(terms) > 1:
        result |= {f"loss_{t}": means[t] for t in terms}
    return result | recipe.derive(result)
