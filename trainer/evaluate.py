"""`evaluate`, a sub-command of every recipe: its measures of a checkpoint, exact on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from trainer.command_line.bounds import Positive
from trainer.command_line.locations import Existing
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Data, Log, Recipe

if TYPE_CHECKING:
    from trainer.checkpoints.checkpoint import Checkpoint
    from trainer.distributed.launch import Launch


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on each evaluation set, and on the test set."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    split: str | None = None
    """one of the sets alone, by its name (default: all)"""
    batch_size: Annotated[int | None, Positive, arg(aliases=("--batch",))] = None
    """samples of one forward, summed over all processes (default: as trained)"""
    device: Device = "auto"


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` of a recipe without one of its own: prints a line per set. UserError for a `split` that does not exist."""
    from trainer.checkpoints.network import find_checkpoint
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    data = load_data(recipe, config, launch)
    sets = data.evaluation | ({} if data.test is None else {"test": data.test})
    chosen = {name: dataset for name, dataset in sets.items() if flags.split in (None, name)}
    if not chosen:
        there = ", ".join(sets) or "none"
        raise UserError(f"{recipe.name} has no set {flags.split or 'to measure'}; build_data gives: {there}")
    batch_size = flags.batch_size or config.optimisation.batch_size
    for name, metrics in measured(recipe, checkpoint, config, data, chosen, batch_size, launch, log).items():
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        log(f"{name}: {values} over {len(chosen[name]):,} samples, each once")


def measured(
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: Any,
    data: Data,
    sets: Mapping[str, Any],
    batch_size: int,
    launch: Launch,
    log: Log,
) -> dict[str, dict[str, float]]:
    """{set: {metric: value}}: means over each whole set of what the recipe measures, and what it derives from them.

    `batch_size`: samples of one forward, summed over all processes. Collective.
    """
    from trainer.checkpoints.network import evaluate_objective, load_for_evaluation

    log(f"Evaluating {checkpoint.path} on {launch.processes} process{'es' if launch.processes > 1 else ''}")
    objective = load_for_evaluation(recipe, checkpoint, config, data, launch)
    return {name: evaluate_objective(recipe, objective, config, each, launch, batch_size) for name, each in sets.items()}
