"""`evaluate` of the regression recipe: a trained model beside ridge and dMMSE, on its own tasks and on new ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from trainer.command_line.bounds import AtLeast, Positive
from trainer.command_line.locations import Existing, ToMake
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Data, Log, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.checkpoints.checkpoint import Checkpoint
    from trainer.distributed.launch import Launch
    from trainer.reporting.run_directory import RunDirectory

Results = dict[str, Any]
DISTRIBUTIONS = ("pretraining", "true")
EVALUATION_SEED = 1  # of the sequences; the same for all models, so that they are compared on the same x and noise
PREDICTORS = {"model": "model", "ridge": "ridge", "dmmse": "dMMSE"}
METRICS = {
    "error_y": "(prediction - y)² / D",
    "error_mean": "(prediction - w.x)² / D",
    "delta": "(model - baseline)² / D",
    "nll": "-log p(y), nats",
}


@dataclass(frozen=True)
class Evaluate:
    """Compare a trained model with ridge and dMMSE: squared errors, distances and likelihoods, with standard errors."""

    model_path: Annotated[str, Existing] = "checkpoints/checkpoint_final"
    """checkpoint folder, as given or of the latest run"""
    eval_sequences: Annotated[int, AtLeast(2)] = 10_000
    """fresh sequences per distribution"""
    eval_batch: Annotated[int, Positive, arg(aliases=("--batch_size", "--batch"))] = 256
    """sequences of one forward"""
    examples: Annotated[int | None, Positive] = None
    """pairs in a sequence (default: as trained); with more, the model is tried on a longer context"""
    seed: int = EVALUATION_SEED
    """seed of the sequences"""
    out: Annotated[str | None, ToMake] = None
    """JSON file for all numbers, also position by position"""
    device: Device = "auto"


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` sub-command; rank 0 does the work."""
    from trainer.checkpoints.network import find_checkpoint
    from trainer.reporting.run_directory import write_text_atomic

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)

    def on_main() -> None:
        log(f"Evaluating {checkpoint.path}")
        options = (flags.eval_sequences, flags.eval_batch, flags.examples, flags.seed)
        results = compare_with_baselines(recipe, checkpoint, config, launch.device, *options)
        for line in results_table(results):
            log(line)
        if flags.out:
            try:
                Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(Path(flags.out), json.dumps(results, indent=1) + "\n")
            except OSError as error:
                raise UserError(f"--out {flags.out}: {error.strerror}; choose another file") from None
            log(f"Results: {flags.out}")

    launch.control.on_main(on_main)


def evaluate_after_training(recipe: Recipe, config: Any, run: RunDirectory, checkpoint: Path, log: Log) -> None:
    """The same comparison at the end of a run, written to evaluation.json in the run directory."""
    import torch

    from trainer.checkpoints.checkpoint import Checkpoint
    from trainer.reporting.run_directory import write_text_atomic

    if config.data.stack or not config.run.eval_sequences:
        return  # `sweep` evaluates the models of a stack later, each in its own run directory
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    options = (config.run.eval_sequences, config.run.eval_batch)
    results = compare_with_baselines(recipe, Checkpoint(checkpoint), config, device, *options)
    write_text_atomic(run.path / "evaluation.json", json.dumps(results, indent=1) + "\n")
    for line in results_table(results):
        log(line)


def load_model(recipe: Recipe, checkpoint: Checkpoint, config: Any, device: torch.device) -> tuple[Any, Tensor]:
    """(the network in evaluation mode, its pool of tasks [pool, size]) of a checkpoint."""
    from trainer.checkpoints.network import load_network

    if config.data.stack:
        raise UserError(f"{checkpoint.path} holds {len(config.data.stack)} stacked models; give one of the runs made of them")
    network = load_network(recipe, checkpoint, config, Data(None, {}), device)
    return network, checkpoint.tensor("tasks", "model_1").to(device)


def compare_with_baselines(
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: Any,
    device: torch.device,
    sequences: int,
    batch_size: int,
    examples: int | None = None,
    seed: int = EVALUATION_SEED,
) -> Results:
    """A model beside ridge and dMMSE, as plain numbers.

    results[distribution][metric][predictor], for the predictors model, ridge and (if the tasks are finite) dmmse: `error_y` and
    `error_mean`, squared errors / D against the noisy y and against w.x; `nll` in nats; `delta`, for ridge and dmmse, the
    model's squared distance / D from them. Each is {`mean`, standard error `se` over sequences, and both `by_position`}.
    """
    import torch

    from recipes.data.regression import RegressionStream

    network, pool = load_model(recipe, checkpoint, config, device)
    d = config.data
    length = examples or d.examples
    results: Results = {
        "num_tasks": d.num_tasks,
        "task_size": d.task_size,
        "noise": d.noise,
        "examples": length,
        "trained_examples": d.examples,
        "step": checkpoint.state["train_state"]["step"],
        "seed": config.optimisation.seed,
        "sequences": sequences,
    }
    for distribution in DISTRIBUTIONS:
        tasks = pool if distribution == "pretraining" else pool[:0]
        stream = RegressionStream(f"evaluation {distribution}", seed, [tasks], d.task_size, length, d.noise)
        stream.to(device)
        batches = []
        with torch.no_grad():
            for start in range(0, sequences, batch_size):
                sample = stream.__getitems__(range(start, min(start + batch_size, sequences)))
                x, y, mean = sample["x"], sample["y"].squeeze(1), sample["mean"].squeeze(1)
                batches.append(_compare(network, x, y, mean, pool, d.noise))
        results[distribution] = {
            metric: {name: _statistics([batch[metric][name] for batch in batches]) for name in batches[0][metric]}
            for metric in batches[0]
        }
    return results


def _compare(network: Any, x: Tensor, y: Tensor, mean: Tensor, pool: Tensor, noise: float) -> dict[str, dict[str, Tensor]]:
    """{metric: {predictor: float64 [sequences, examples]}} of one batch."""
    from recipes.baselines.regression import Prediction, dmmse, ridge

    logits, size = network(x, y), x.shape[-1]
    model = Prediction(network.mean(logits).double(), network.log_density(logits, y).double())
    baselines = {"ridge": ridge(x, y, noise)} | ({"dmmse": dmmse(x, y, pool, noise)} if len(pool) else {})
    predictions = {"model": model, **baselines}
    return {
        "error_y": {name: (p.mean - y).square() / size for name, p in predictions.items()},
        "error_mean": {name: (p.mean - mean).square() / size for name, p in predictions.items()},
        "delta": {name: (model.mean - p.mean).square() / size for name, p in baselines.items()},
        "nll": {name: -p.log_density for name, p in predictions.items()},
    }


def _statistics(batches: list[Tensor]) -> dict[str, Any]:
    """The mean of values [sequences, examples] over sequences and its standard error: averaged over positions, and for each."""
    import torch

    values = torch.cat(batches).cpu()
    root = math.sqrt(len(values))
    return {
        "mean": float(values.mean()),
        "se": float(values.mean(1).std() / root),
        "by_position": {"mean": values.mean(0).tolist(), "se": (values.std(0) / root).tolist()},
    }


def results_table(results: Results) -> list[str]:
    """The averages over positions, as lines to print."""
    number, trained = results["num_tasks"], results["trained_examples"]
    tasks = "1 task" if number == 1 else f"{number or 'infinitely many'} tasks"
    longer = results["examples"] > trained
    lines = [
        f"{results['sequences']:,} fresh sequences each of {results['examples']} examples"
        + (f" (trained on {trained})" if longer else "")
        + f", D = {results['task_size']}, noise variance {results['noise']:g}; mean ± standard error",
        f"{'':34}{'its own ' + tasks:>22}{'new tasks':>22}",
    ]
    for metric, title in METRICS.items():
        for name in results["true"][metric]:
            columns = [results[distribution][metric][name] for distribution in DISTRIBUTIONS]
            cells = "".join(f"{column['mean']:>12.4f} ± {column['se']:.4f} " for column in columns)
            lines.append(f"{title:26}{PREDICTORS[name]:8}{cells}")
    if longer:
        for distribution, text in zip(DISTRIBUTIONS, ("its own", "new"), strict=True):
            errors = results[distribution]["error_mean"]
            beyond = {name: errors[name]["by_position"]["mean"][trained:] for name in ("model", "ridge")}
            model, ridge = (sum(values) / len(values) for values in beyond.values())
            lines.append(f"beyond the trained length, {text} tasks, against w.x: model {model:.4f}, ridge {ridge:.4f}")
    return lines
