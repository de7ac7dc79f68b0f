"""A trained regression PFN beside ridge and dMMSE on fresh sequences, of its own tasks and of tasks it has never seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from trainer.errors import Refusal
from trainer.recipe import Data, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.checkpoint import Checkpoint
    from trainer.launch import Launch
    from trainer.run_directory import RunDirectory

Say = Callable[[str], None]
Results = dict[str, Any]
DISTRIBUTIONS = ("pretraining", "true")
EVALUATION_SEED = 1  # of the sequences; the same for every model, so that models are compared on the same x and noise


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model beside ridge and dMMSE: squared errors, distances and likelihoods, with standard errors."""

    model_path: str = "checkpoints/checkpoint_final"
    """checkpoint folder, as given or below the latest run"""
    eval_sequences: int = 10_000
    """fresh sequences per distribution"""
    eval_batch: Annotated[int, arg(aliases=("--batch_size", "--batch"))] = 256
    """sequences of one forward"""
    examples: int | None = None
    """pairs in a sequence (default: as trained); more of them show what the model makes of a longer context"""
    seed: int = EVALUATION_SEED
    """seed of the sequences"""
    out: str | None = None
    """JSON file for all numbers, position by position"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, say: Say) -> None:
    """The `evaluate` sub-command: on rank 0."""
    import torch

    from trainer.inference import find
    from trainer.run_directory import write_text_atomic

    for name, value, least in (("eval_sequences", flags.eval_sequences, 2), ("eval_batch", flags.eval_batch, 1)):
        if value < least:
            raise Refusal(f"{name} {value} must be at least {least}")
    if flags.examples is not None and flags.examples < 1:
        raise Refusal(f"examples {flags.examples} must be at least 1")
    found, config = find(recipe, flags.model_path, launch)

    def act() -> None:
        say(f"Evaluating {found.path}")
        options = (flags.eval_sequences, flags.eval_batch, flags.examples, flags.seed)
        with torch.no_grad():
            results = measure(recipe, found, config, launch.device, *options)
        for line in table(results):
            say(line)
        if flags.out:
            try:
                Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(Path(flags.out), json.dumps(results, indent=1) + "\n")
            except OSError as error:
                raise Refusal(f"--out {flags.out}: {error.strerror}; choose another file") from None
            say(f"Results: {flags.out}")

    launch.control.on_main(act)


def evaluate_after_training(recipe: Recipe, config: Any, run: RunDirectory, checkpoint: Path, say: Say) -> None:
    """At the end of a run: the comparison, into the run directory's evaluation.json."""
    import torch

    from trainer.checkpoint import Checkpoint
    from trainer.run_directory import write_text_atomic

    if config.data.stack or not config.run.eval_sequences:
        return  # the models of a stack are evaluated once they are in run directories of their own
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    with torch.no_grad():
        found = Checkpoint(checkpoint)
        results = measure(recipe, found, config, device, config.run.eval_sequences, config.run.eval_batch)
    write_text_atomic(run.path / "evaluation.json", json.dumps(results, indent=1) + "\n")
    for line in table(results):
        say(line)


def load(recipe: Recipe, found: Checkpoint, config: Any, device: torch.device) -> tuple[Any, Tensor]:
    """(the network, its pool of tasks [pool, size]) of a checkpoint, in evaluation mode."""
    from trainer.setup import build_network, load_weights

    if config.data.stack:
        raise Refusal(f"{found.path} holds {len(config.data.stack)} stacked models; give one of the runs made of them")
    network = build_network(recipe, config, Data(None, {}))
    load_weights(network, found)
    return network.to(device).eval(), found.tensor("tasks", "model_1").to(device)


def measure(
    recipe: Recipe,
    found: Checkpoint,
    config: Any,
    device: torch.device,
    sequences: int,
    batch: int,
    examples: int | None = None,
    seed: int = EVALUATION_SEED,
) -> Results:
    """What is known of a model, as plain numbers.

    By distribution: `error_y` and `error_mean`, squared errors / D against the noisy y and against w.x, of model, ridge and
    dmmse; `delta`, the model's mean squared distance / D from ridge and dmmse; `nll` in nats, of the three. Each has its
    `mean` and standard error `se` over sequences, and both `by_position`. With infinitely many tasks there is no dmmse.
    """
    from recipes.data.regression import RegressionStream

    network, pool = load(recipe, found, config, device)
    d = config.data
    length = examples or d.examples
    results: Results = {
        "num_tasks": d.num_tasks,
        "task_size": d.task_size,
        "noise": d.noise,
        "examples": length,
        "trained_examples": d.examples,
        "step": found.state["progress"]["step"],
        "seed": config.optimisation.seed,
        "sequences": sequences,
    }
    for name in DISTRIBUTIONS:
        own = name == "pretraining"
        stream = RegressionStream(f"evaluation {name}", seed, [pool if own else pool[:0]], d.task_size, length, d.noise)
        stream.to(device)
        chunks = []
        for start in range(0, sequences, batch):
            sample = stream.__getitems__(range(start, min(start + batch, sequences)))
            chunks.append(_compare(network, sample["x"], sample["y"].squeeze(1), sample["mean"].squeeze(1), pool, d.noise))
        results[name] = {
            kind: {who: _statistics([chunk[kind][who] for chunk in chunks]) for who in chunks[0][kind]} for kind in chunks[0]
        }
    return results


def _compare(network: Any, x: Tensor, y: Tensor, mean: Tensor, pool: Tensor, noise: float) -> dict[str, dict[str, Tensor]]:
    """{kind: {whose: float64 [sequences, examples]}} of one batch."""
    from recipes.studies.regression_baselines import Prediction, dmmse, ridge

    logits, size = network(x, y), x.shape[-1]
    model = Prediction(network.mean(logits).double(), network.log_density(logits, y).double())
    known = {"ridge": ridge(x, y, noise)} | ({"dmmse": dmmse(x, y, pool, noise)} if len(pool) else {})
    everyone = {"model": model, **known}
    return {
        "error_y": {who: (p.mean - y).square() / size for who, p in everyone.items()},
        "error_mean": {who: (p.mean - mean).square() / size for who, p in everyone.items()},
        "delta": {who: (model.mean - p.mean).square() / size for who, p in known.items()},
        "nll": {who: -p.log_density for who, p in everyone.items()},
    }


def _statistics(chunks: list[Tensor]) -> dict[str, Any]:
    """Mean over sequences and its standard error: of the average over positions, and position by position."""
    import torch

    values = torch.cat(chunks).cpu()
    spread = math.sqrt(len(values))
    return {
        "mean": float(values.mean()),
        "se": float(values.mean(1).std() / spread),
        "by_position": {"mean": values.mean(0).tolist(), "se": (values.std(0) / spread).tolist()},
    }


def table(results: Results) -> list[str]:
    """The averages over positions, as lines to print."""
    number = results["num_tasks"]
    tasks = f"{number or 'infinitely many'} task{'s' * (number != 1)}"
    longer = results["examples"] > results["trained_examples"]
    lines = [
        f"{results['sequences']:,} fresh sequences each of {results['examples']} examples"
        + (f" (trained on {results['trained_examples']})" if longer else "")
        + f", D = {results['task_size']}, noise variance {results['noise']:g}; mean ± standard error",
        f"{'':34}{'its own ' + tasks:>22}{'new tasks':>22}",
    ]
    names = {"model": "model", "ridge": "ridge", "dmmse": "dMMSE"}
    kinds = {
        "error_y": "(prediction - y)² / D",
        "error_mean": "(prediction - w.x)² / D",
        "delta": "(model - baseline)² / D",
        "nll": "-log p(y), nats",
    }
    for kind, text in kinds.items():
        for who in results["true"][kind]:
            pair = [results[name][kind][who] for name in DISTRIBUTIONS]
            lines.append(f"{text:26}{names[who]:8}" + "".join(f"{p['mean']:>12.4f} ± {p['se']:.4f} " for p in pair))
    if longer:
        split = results["trained_examples"]
        for name in DISTRIBUTIONS:
            pair = [results[name]["error_mean"][who]["by_position"]["mean"][split:] for who in ("model", "ridge")]
            means = [sum(values) / len(values) for values in pair]
            text = "its own" if name == "pretraining" else "new"
            lines.append(f"beyond the trained length, {text} tasks, against w.x: model {means[0]:.4f}, ridge {means[1]:.4f}")
    return lines
