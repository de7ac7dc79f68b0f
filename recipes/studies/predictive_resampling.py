"""Predictive resampling (Fong, Holmes & Walker 2023, "Martingale posterior distributions"): what a model believes about a task.

A few pairs are given; the model continues them again and again, each time with new x and y drawn from its own predictions.
The ridge estimate of w on each continued sequence is a draw of its belief, beside which stands the exact posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import Refusal
from trainer.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.launch import Launch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Predict:
    """Give a trained model a few pairs of one task, and compare what it then believes with the exact posterior."""

    model_path: str = "checkpoints/checkpoint_final"
    """checkpoint folder, as given or below the latest run"""
    observed: int = 8
    """pairs given"""
    future: int | None = None
    """pairs drawn after them (default: up to the trained number of examples)"""
    paths: int = 200
    """continuations"""
    distribution: Literal["true", "pretraining"] = "true"
    """where the task comes from: a new one, or one of the model's own"""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def predict(recipe: Recipe, flags: Predict, launch: Launch, say: Say) -> None:
    """The `predict` sub-command: on rank 0."""
    import torch

    from trainer.inference import find

    found, config = find(recipe, flags.model_path, launch)
    future = config.data.examples - flags.observed if flags.future is None else flags.future
    for name, value, least in (("observed", flags.observed, 0), ("future", future, 1), ("paths", flags.paths, 2)):
        if value < least:
            raise Refusal(f"{name} {value} must be at least {least}; the model was trained on {config.data.examples} examples")

    def act() -> None:
        with torch.no_grad():
            for line in report(recipe, found, config, flags, future, launch.device):
                say(line)

    launch.control.on_main(act)


def report(recipe: Recipe, found: Any, config: Any, flags: Predict, future: int, device: torch.device) -> list[str]:
    """Lines: the next y, and w coordinate by coordinate, as the model and as the exact posterior have them."""
    import torch

    from recipes.data.regression import RegressionStream
    from recipes.studies.regression_evaluation import load

    network, pool = load(recipe, found, config, device)
    d = config.data
    own = flags.distribution == "pretraining"
    stream = RegressionStream("predict", flags.seed, [pool if own else pool[:0]], d.task_size, flags.observed + 1, d.noise)
    stream.to(device)
    sample = stream.__getitems__([0])
    x, y, n = sample["x"][0], sample["y"][0, 0], flags.observed
    generator = torch.Generator(device).manual_seed(flags.seed)
    all_x, all_y = resample(network, x[:n], y[:n], flags.paths, future, generator)
    mean, covariance = posterior(x[:n].unsqueeze(0), y[:n].unsqueeze(0), d.noise)
    later, later_covariance = posterior(all_x, all_y, d.noise)
    # The estimate after n + future pairs varies by what those pairs can still teach: that much less than the posterior.
    exact = (covariance[0] - later_covariance.mean(0)).diagonal().clamp_min(0).sqrt()
    logits = network(x.unsqueeze(0), y.unsqueeze(0))[0, -1]
    draws = network.sample(logits.expand(4096, -1), generator)
    spread = (d.noise + x[n].double() @ covariance[0] @ x[n].double()).sqrt()
    after = f"estimate after {future} more"
    lines = [
        f"{n} pairs of a {'pretraining' if own else 'new'} task given; {flags.paths} continuations of {future} pairs",
        f"next y: model {float(network.mean(logits)):+.3f} ± {float(draws.std()):.3f}, "
        f"exact {float(mean[0] @ x[n].double()):+.3f} ± {float(spread):.3f} (posterior for w ~ N(0, I))",
        f"{'':4}{'exact posterior':>20}{after + ', exact':>34}{after + ', model':>34}",
    ]
    for i in range(d.task_size):
        columns = [(20, mean[0, i], covariance[0, i, i].sqrt()), (34, mean[0, i], exact[i])]
        columns.append((34, later[:, i].mean(), later[:, i].std()))
        lines.append(f"w{i:<3}" + "".join(f"{f'{float(m):+.3f} ± {float(s):.3f}':>{width}}" for width, m, s in columns))
    return lines


def resample(network: Any, x: Tensor, y: Tensor, paths: int, future: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Continue (x [n, size], y [n]) `paths` times by `future` pairs: x [paths, n + future, size], y [paths, n + future].

    New x are standard normal, each new y is drawn from the network's prediction given all pairs before it.
    """
    import torch

    n, size = x.shape
    new = torch.randn(paths, future, size, device=x.device, generator=generator)
    all_x = torch.cat([x.expand(paths, -1, -1), new], 1)
    all_y = torch.cat([y.expand(paths, -1), torch.zeros(paths, future, device=x.device)], 1)
    for i in range(n, n + future):
        logits = network(all_x[:, : i + 1], all_y[:, : i + 1])[:, -1]  # the y of the query itself is not looked at
        all_y[:, i] = network.sample(logits, generator)
    return all_x, all_y


def posterior(x: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean [..., size] and covariance [..., size, size] of w ~ N(0, I) after all pairs, float64."""
    import torch

    x, y = x.double(), y.double()
    precision = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + x.mT @ x / noise
    covariance = torch.linalg.inv(precision)
    return (covariance @ x.mT @ y.unsqueeze(-1)).squeeze(-1) / noise, covariance
