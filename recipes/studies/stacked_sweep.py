"""All models of a sweep that are alike but for their tasks, trained as one network, then each put into its own run directory.

A stacked run is an ordinary run of the recipe (`train --stack 4 16 64`) and stops and resumes as any other. What `unstack`
makes of it cannot be told from runs of one model each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from recipes.studies.task_diversity import RECIPE_FILE, PlannedModel
from trainer import checkpoint, job_queue, retention
from trainer import config as configuration
from trainer.checkpoint import Checkpoint
from trainer.job_queue import Job
from trainer.metrics import read_metrics
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory

Say = Callable[[str], None]


def train_stacked(
    recipe: Recipe, models: Sequence[PlannedModel], queues: Sequence[Mapping[str, str]], say: Say
) -> dict[str, job_queue.State]:
    """Train what has no run directory yet, one stack for each task size; what became of the stacks, by name."""
    jobs, members = [], {}
    for size, group in itertools.groupby(models, key=lambda model: model.config.data.task_size):
        wanted = {model.config.data.num_tasks: model for model in group}
        digest = hashlib.sha256(repr(sorted(wanted)).encode()).hexdigest()[:6]
        folder = models[0].directory.parent / f"stack{len(wanted)}-size{size}-{digest}"
        pools = _pools_of(folder) or [number for number, model in wanted.items() if not model.directory.exists()]
        missing = [number for number in pools if not wanted[number].directory.exists()]
        if not missing or len(pools) == 1:  # one model needs no stack: the sweep trains it as it is
            continue
        command = [sys.executable, str(RECIPE_FILE), "train", *wanted[pools[0]].arguments, "--output_dir", str(folder)]
        command += ["--stack", *map(str, pools)]
        jobs.append(Job(folder.name, command, folder, lambda folder=folder: _finished(folder)))
        members[folder.name] = [wanted[number] for number in missing]

    def ended(job: Job) -> None:
        for model in members[job.name]:
            unstack(recipe, job.directory, model.config, model.directory)
        say(f"{job.name}: {len(members[job.name])} models are in run directories of their own")

    return job_queue.run(jobs, queues, say, ended)


def _finished(folder: Path) -> bool:
    try:
        return json.loads(RunDirectory(folder).status.read_text())["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def _pools_of(folder: Path) -> list[int]:
    """The pool sizes of a stacked run that has begun."""
    try:
        return yaml.safe_load(RunDirectory(folder).config.read_text(encoding="utf-8"))["data"]["stack"]
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return []


def unstack(recipe: Recipe, stacked: Path, config: Any, target: Path) -> None:
    """Make the run directory `target` of the model of `config` out of a finished stacked run; whole or not at all."""
    from trainer.launch import Control

    source, number = RunDirectory(stacked), config.data.num_tasks
    place = _pools_of(stacked).index(number)
    temporary = target.with_name(f"{checkpoint.TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    made = RunDirectory(temporary)
    made.checkpoints.mkdir(parents=True)
    rows = [_row_of(row, place) for row in read_metrics(source.metrics)]
    rows = [row for row in rows if row.keys() - {"step", "time"}]
    for row in rows:
        if any(name.startswith("final/") for name in row):
            row["final/train_loss"] = next(r["train/loss"] for r in reversed(rows) if "train/loss" in r)
    made.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, run=replace(config.run, output_dir=str(target), checkpoint_dir=None))
    made.config.write_text(configuration.to_yaml(config), encoding="utf-8")
    made.write_command([recipe.name, "train", "--output_dir", str(target), f"(model {place + 1} of {stacked})"])
    shutil.copy(source.environment, made.environment)
    control = Control(0, 1, timedelta(minutes=1))
    folders = dict(reversed(retention.step_folders(source.checkpoints, recipe.checkpoint_prefix)))
    best_key = f"eval/{recipe.best_metric}"
    measured = [(row[best_key], row["step"]) for row in rows if row.get(best_key) is not None and row["step"] in folders]
    for step, folder in folders.items():
        found = Checkpoint(folder)
        best = min((pair for pair in measured if pair[1] <= step), default=(None, 0))
        state = _state_of(found.state, place, rows, step, best)
        documents = {"trainer_state.json": json.dumps(state, indent=1), "config.yaml": configuration.to_yaml(config)}
        checkpoint.write(made.checkpoints, folder.name, _tensors_of(found, place), documents, control)
    last = f"{recipe.checkpoint_prefix}{step}"
    retention.link(made.checkpoints, "checkpoint_final", last)
    if best[1]:
        retention.link(made.checkpoints, "best_model", f"{recipe.checkpoint_prefix}{best[1]}")
    made.write_status("finished", "last step", step, target / "checkpoints" / last)
    os.rename(temporary, target)


def _tensors_of(found: Checkpoint, place: int) -> dict[str, list[Any]]:
    """The entries of one model: its slice of every parameter and moment; the optimizer's step count belongs to all."""
    from trainer.portable_state import STEP, Entry, plain_entries

    def entry(stem: str, name: str) -> Entry:
        shape = found.shape(stem, name)
        if stem == "optimizer" and name == STEP:
            return plain_entries({name: found.tensor(stem, name)})[0]
        read = lambda: found.tensor(stem, name)[place].contiguous()  # noqa: E731
        return Entry(name, shape[1:], found.tensor(stem, name).dtype, read)

    entries: dict[str, list[Any]] = {
        stem: [entry(stem, name) for name in sorted(found.names(stem))] for stem in ("model", "optimizer")
    }
    return entries | {"tasks": plain_entries({"model_1": found.tensor("tasks", f"model_{place + 1}")})}


def _state_of(
    state: dict[str, Any], place: int, rows: Sequence[dict[str, Any]], step: int, best: tuple[float | None, int]
) -> dict[str, Any]:
    """trainer_state.json of one model: its own sums and losses, and the best of its evaluations that has a checkpoint."""
    progress = state["progress"]
    losses = [row["train/loss"] for row in rows if row["step"] <= step and "train/loss" in row]
    evaluated = [row["eval/val_loss"] for row in rows if row["step"] == progress["evaluated_step"] and "eval/val_loss" in row]
    own = {
        "evaluated": evaluated[-1] if evaluated else None,
        "train_loss": losses[-1] if losses else None,
        "best": best[0],
        "best_step": best[1],
        "watched_best": best[0],
    }
    own |= {name: [progress[name][place]] if progress[name] else [] for name in ("sums", "counts")}
    return {**state, "progress": {**progress, **own, "evaluations_without_better": 0}}


def _row_of(row: dict[str, Any], place: int) -> dict[str, Any]:
    """A line of metrics.jsonl as the model alone would have written it; what belongs to the stack as a whole is left out."""
    own = f"_model_{place + 1}"
    kept = ("step", "time", "train/learning_rate", "train/epoch")
    found = {name: value for name, value in row.items() if name in kept}
    return found | {name.removesuffix(own): value for name, value in row.items() if name.endswith(own)}
