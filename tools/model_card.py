"""The model card of an export: training data and settings, losses, and the command that trained the model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.reporting.trackers import read_metrics


def model_card(checkpoint: Checkpoint) -> str:
    """The text of the export's README.md. Of paths it holds the last part only, so that it tells nothing about the machine."""
    recipe, config = checkpoint.state["recipe"], checkpoint.config
    step, o = checkpoint.state["train_state"]["step"], config["optimisation"]
    samples = o["batch_size"] * o["gradient_accumulation_steps"]
    length = config["model"].get("context_length") or config["model"]["max_length"]
    begun = f", from the weights of `{Path(o['init_from']).name}`" if o["init_from"] else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {recipe}, step {step:,}",
        "",
        f"Trained by samecurve on {_trained_on(config['data'])}{begun}: {step:,} steps of {samples} samples of up to {length} "
        f"tokens, {o['optimizer']}, peak learning rate {o['learning_rate']:g}, seed {o['seed']}.",
        "",
        "| measured | nats per token |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in _measured(checkpoint).items()),
        "",
    ]
    if config["run"]["eval_iters"]:
        lines += [f"Measured on at most {config['run']['eval_iters'] * samples:,} windows of each set, spread over it.", ""]
    command = _beside(checkpoint, "command.txt")
    if command is not None:
        *_, last = command.read_text(encoding="utf-8").splitlines()
        words = [Path(word).name if "/" in word else word for word in shlex.split(last)]
        lines += ["Command:", "", f"    {shlex.join(words)}", ""]
    return "\n".join(lines)


def _beside(checkpoint: Checkpoint, name: str) -> Path | None:
    """A file of the run directory that the checkpoint is in; None if there is no such file."""
    places = (checkpoint.path.parent.parent / name, checkpoint.path.parent / name)
    return next((path for path in places if path.is_file()), None)


def _trained_on(data: dict[str, Any]) -> str:
    """The names of the training data, from the data section of the configuration."""
    given = data.get("train_data_path") or data.get("data_dir") or data["dataset"]
    paths = [given] if isinstance(given, str) else given
    return ", ".join(f"`{Path(path).name}`" for path in paths)


def _measured(checkpoint: Checkpoint) -> dict[str, float]:
    """{description: loss}: the evaluation of the checkpoint's step, from metrics.jsonl or else the checkpoint itself; the run's
    baseline; and the training loss."""
    progress = checkpoint.state["train_state"]
    step = progress["step"]
    measured: dict[str, float] = {}
    metrics, baseline = _beside(checkpoint, "metrics.jsonl"), _beside(checkpoint, "plots/baseline.json")
    rows = [row for row in read_metrics(metrics) if row["step"] == step] if metrics else []
    for key, name in (("eval/val_loss", "validation loss"), ("eval/train_loss", "training loss, in evaluation")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            measured[name] = values[-1]
    if not measured and progress["evaluated_step"] == step and progress["evaluated_metric"] is not None:
        measured["validation loss"] = progress["evaluated_metric"]
    if baseline is not None:
        known = json.loads(baseline.read_text(encoding="utf-8"))
        measured[f"for scale: {known['name']} on the same tokens"] = known["loss"]
    if progress["train_loss"] is not None:
        measured["training loss of the last log interval"] = progress["train_loss"]
    return measured
