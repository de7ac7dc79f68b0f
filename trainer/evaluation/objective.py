"""Network and loss in one module, so that DDP, ZeRO and torch.compile see the loss inside `forward`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed.hardware import sum_dtype
from trainer.errors import UserError
from trainer.recipe import Batch, Measured, Recipe


class Objective(nn.Module):
    """The module that backends prepare and the loop calls. It returns only scalars, because Accelerate casts the outputs of a
    prepared module to fp32, and for logits that would take gigabytes."""

    def __init__(self, network: nn.Module, recipe: Recipe, terms: Sequence[str] = ()) -> None:
        """`terms`: the loss terms, in the order of what `forward` returns; not needed for measuring."""
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.terms = list(terms)
        self.config = getattr(network, "config", None)  # where DeepSpeed looks for hidden_size when a bucket is "auto"

    def forward(self, batch: Batch, measuring: bool = False) -> Any:
        """Loss sums, a tensor [terms]. With `measuring`: {name: tensor [sum, count], or [sum] for a loss term}, in `sum_dtype`.

        UserError if the recipe's `loss` gives other terms than its `items`, or a term that is not summed to one number.
        """
        if measuring:
            return {name: _numbers(value) for name, value in self.recipe.measure(self.network, batch).items()}
        sums = self.recipe.loss(self.network, batch)
        if sums.keys() != set(self.terms):
            raise UserError(f"loss gives the terms {', '.join(sums)}, items counts {', '.join(self.terms)}; name the same")
        losses = [sums[term].float() for term in self.terms]
        for loss in losses:
            if loss.ndim:
                term = next(term for term in self.terms if sums[term].ndim)
                raise UserError(f"loss gives {term} as {list(loss.shape)}; sum it over the batch, to one number")
        return torch.stack(losses) if len(losses) > 1 else losses[0].reshape(1)


def _numbers(measured: Measured) -> Tensor:
    """[sum, count] or [sum] as a tensor on the device of the sum."""
    total, *count = (torch.as_tensor(value) for value in (measured if isinstance(measured, tuple) else (measured,)))
    return torch.stack([value.to(total.device, sum_dtype(total.device)) for value in (total, *count)])


def objective_weights(recipe: Recipe, config: Any, terms: Iterable[str]) -> dict[str, float]:
    """{loss term: its weight in the objective}, in the order of `terms`; 0 for terms that are only monitored."""
    given = recipe.loss_weights(config)
    return {term: 0.0 if term in recipe.monitored else float(given.get(term, 1.0)) for term in terms}


def summarise(recipe: Recipe, means: Mapping[str, float], loss_weights: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the means of all measures: `loss` (the weighted objective), `loss_{term}` if there are several terms, the
    other means, and what `recipe.derive` makes of them."""
    terms = [name for name in means if name in loss_weights and name not in recipe.monitored]
    result = {name: value for name, value in means.items() if name not in terms}
    if terms:
        result = {"loss": sum(loss_weights[t] * means[t] for t in terms), **result}
    if len(terms) > 1:
        result |= {f"loss_{t}": means[t] for t in terms}
    return result | recipe.derive(result)
