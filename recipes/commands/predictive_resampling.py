"""`predict` of the regression recipe: the posterior of w that a model implies, by predictive resampling, beside the exact one.

After Fong, Holmes & Walker 2023, "Martingale posterior distributions". A few pairs are given; the model continues them many
times, each time with new x and with y drawn from its own predictions. The ridge estimates of w on the continued sequences are
samples of its posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from trainer.command_line.bounds import AtLeast, NotNegative, Positive
from trainer.command_line.locations import Existing
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Log, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.checkpoints.checkpoint import Checkpoint
    from trainer.distributed.launch import Launch


@dataclass(frozen=True)
class Predict:
    """Give a trained model a few pairs of one task, and compare the posterior it implies with the exact one."""

    model_path: Annotated[str, Existing] = "checkpoints/checkpoint_final"
    """checkpoint folder, as given or of the latest run"""
    observed: Annotated[int, NotNegative] = 8
    """pairs given"""
    future: Annotated[int | None, Positive] = None
    """pairs drawn after them (default: up to the trained number of examples)"""
    paths: Annotated[int, AtLeast(2)] = 200
    """continuations"""
    distribution: Literal["true", "pretraining"] = "true"
    """a new task, or one of those the model was trained on"""
    seed: Annotated[int, NotNegative] = 0
    device: Device = "auto"


def predict(recipe: Recipe, flags: Predict, launch: Launch, log: Log) -> None:
    """The `predict` sub-command; rank 0 does the work."""
    from trainer.checkpoints.network import find_checkpoint

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    future = config.data.examples - flags.observed if flags.future is None else flags.future
    if future < 1:
        raise UserError(
            f"future {future} must be at least 1: the model was trained on {config.data.examples} examples; give fewer "
            "--observed, or a --future"
        )

    def on_main() -> None:
        for line in compare_posteriors(recipe, checkpoint, config, flags, future, launch.device):
            log(line)

    launch.control.on_main(on_main)


def compare_posteriors(
    recipe: Recipe, checkpoint: Checkpoint, config: Any, flags: Predict, future: int, device: torch.device
) -> list[str]:
    """Lines to print: the next y, and each coordinate of w, by the model and by the exact posterior."""
    import torch

    from recipes.commands.regression_evaluation import load_model
    from recipes.data.regression import RegressionStream

    network, pool = load_model(recipe, checkpoint, config, device)
    d, n = config.data, flags.observed
    tasks = pool if flags.distribution == "pretraining" else pool[:0]
    stream = RegressionStream("predict", flags.seed, [tasks], d.task_size, n + 1, d.noise)
    stream.to(device)
    sample = stream.__getitems__([0])
    x, y = sample["x"][0], sample["y"][0, 0]
    generator = torch.Generator(device).manual_seed(flags.seed)
    with torch.no_grad():
        all_x, all_y = resample(network, x[:n], y[:n], flags.paths, future, generator)
        logits = network(x.unsqueeze(0), y.unsqueeze(0))[0, -1]
        next_y = network.sample(logits.expand(4096, -1), generator)
    mean, covariance = posterior(x[:n].unsqueeze(0), y[:n].unsqueeze(0), d.noise)
    estimates, later_covariance = posterior(all_x, all_y, d.noise)
    # The estimate after n + future pairs varies less than w does: its variance lacks what is still unknown after those pairs.
    estimate_std = (covariance[0] - later_covariance.mean(0)).diagonal().clamp_min(0).sqrt()
    next_y_std = (d.noise + x[n].double() @ covariance[0] @ x[n].double()).sqrt()
    title = f"estimate after {future} more"
    lines = [
        f"{n} pairs of a {'pretraining' if flags.distribution == 'pretraining' else 'new'} task given; {flags.paths} "
        f"continuations of {future} pairs",
        f"next y: model {float(network.mean(logits)):+.3f} ± {float(next_y.std()):.3f}, "
        f"exact {float(mean[0] @ x[n].double()):+.3f} ± {float(next_y_std):.3f} (posterior for w ~ N(0, I))",
        f"{'':4}{'exact posterior':>20}{title + ', exact':>34}{title + ', model':>34}",
    ]
    for i in range(d.task_size):
        columns = [(20, mean[0, i], covariance[0, i, i].sqrt()), (34, mean[0, i], estimate_std[i])]
        columns.append((34, estimates[:, i].mean(), estimates[:, i].std()))
        cells = "".join(f"{f'{float(m):+.3f} ± {float(std):.3f}':>{width}}" for width, m, std in columns)
        lines.append(f"w{i:<3}{cells}")
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
        logits = network(all_x[:, : i + 1], all_y[:, : i + 1])[:, -1]  # they do not depend on the y of the query, still 0
        all_y[:, i] = network.sample(logits, generator)
    return all_x, all_y


def posterior(x: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean [..., size] and covariance [..., size, size] of w ~ N(0, I) after all pairs, float64."""
    import torch

    x, y = x.double(), y.double()
    precision = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + x.mT @ x / noise
    covariance = torch.linalg.inv(precision)
    return (covariance @ x.mT @ y.unsqueeze(-1)).squeeze(-1) / noise, covariance
