"""Models of a sweep that differ only in their tasks, trained as one network, and then split into run directories of their own.

A stacked run is an ordinary run of the recipe (`train --stack 4 16 64`), stopped and resumed like any other. The run
directories that `unstack` makes of it are like those of models that were trained alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from recipes.experiments import job_queue
from recipes.experiments.job_queue import Job
from recipes.experiments.sweep_models import RECIPE_FILE, SweepModel, is_finished
from trainer.backends.tensors import TensorEntry, whole_entries, whole_entry
from trainer.checkpoints import retention, writing
from trainer.checkpoints.checkpoint import TEMPORARY, Checkpoint
from trainer.command_line import config as configuration
from trainer.recipe import Log, Recipe
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import read_metrics

Row = dict[str, Any]  # a line of metrics.jsonl


def train_stacked(
    recipe: Recipe, models: Sequence[SweepModel], queues: Sequence[Mapping[str, str]], log: Log
) -> dict[str, job_queue.State]:
    """Train the models without a run directory, in one stack for each task size. Returns {stack: its final state}."""
    jobs: list[Job] = []
    unfinished: dict[str, list[SweepModel]] = {}
    for size, group in itertools.groupby(models, key=lambda model: model.config.data.task_size):
        by_pool = {model.config.data.num_tasks: model for model in group}
        digest = hashlib.sha256(repr(sorted(by_pool)).encode()).hexdigest()[:6]
        folder = models[0].directory.parent / f"stack{len(by_pool)}-size{size}-{digest}"
        new_pools = [pool for pool, model in by_pool.items() if not model.directory.exists()]
        pools = _stacked_pools(folder) or new_pools  # a stack that was begun keeps its pools
        missing = [by_pool[pool] for pool in pools if not by_pool[pool].directory.exists()]
        if not missing or len(pools) == 1:  # one model needs no stack: the sweep trains it as it is
            continue
        command = [sys.executable, str(RECIPE_FILE), "train", *by_pool[pools[0]].arguments, "--output_dir", str(folder)]
        command += ["--stack", *map(str, pools)]
        jobs.append(Job(folder.name, command, folder, partial(is_finished, folder)))
        unfinished[folder.name] = missing

    def on_done(job: Job) -> None:
        for model in unfinished[job.name]:
            unstack(recipe, job.directory, model.config, model.directory)
        log(f"{job.name}: {len(unfinished[job.name])} models are in run directories of their own")

    return job_queue.run(jobs, queues, log, on_done)


def _stacked_pools(folder: Path) -> list[int]:
    """The pool sizes of a stacked run; empty if it has not begun."""
    try:
        return yaml.safe_load(RunDirectory(folder).config.read_text(encoding="utf-8"))["data"]["stack"]
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return []


def unstack(recipe: Recipe, stacked: Path, config: Any, target: Path) -> None:
    """Make the run directory `target` of the model with settings `config` from a finished stacked run; whole or not at all."""
    source = RunDirectory(stacked)
    index = _stacked_pools(stacked).index(config.data.num_tasks)
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    run = RunDirectory(temporary)
    run.checkpoints.mkdir(parents=True)
    rows = _metrics_of_model(read_metrics(source.metrics), index)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, run=replace(config.run, output_dir=str(target), checkpoint_dir=None))
    run.config.write_text(configuration.to_yaml(config), encoding="utf-8")
    run.write_command([recipe.name, "train", "--output_dir", str(target), f"(model {index + 1} of {stacked})"])
    shutil.copy(source.environment, run.environment)
    step, best_step = _unstack_checkpoints(recipe, source, config, run, rows, index)
    last = f"{recipe.checkpoint_prefix}{step}"
    retention.link(run.checkpoints, "checkpoint_final", last)
    if best_step:
        retention.link(run.checkpoints, "best_model", f"{recipe.checkpoint_prefix}{best_step}")
    run.write_status("finished", "last step", step, target / "checkpoints" / last)
    os.rename(temporary, target)


def _metrics_of_model(rows: Sequence[Row], index: int) -> list[Row]:
    """metrics.jsonl as the model alone would have written it: metrics of the whole stack are left out."""
    suffix = f"_model_{index + 1}"
    shared = ("step", "time", "train/learning_rate", "train/epoch")
    of_model: list[Row] = []
    for row in rows:
        kept = {name: value for name, value in row.items() if name in shared}
        kept |= {name.removesuffix(suffix): value for name, value in row.items() if name.endswith(suffix)}
        if kept.keys() <= {"step", "time"}:
            continue
        of_model.append(kept)
        if any(name.startswith("final/") for name in kept):
            kept["final/train_loss"] = next(r["train/loss"] for r in reversed(of_model) if "train/loss" in r)
    return of_model


def _unstack_checkpoints(
    recipe: Recipe, source: RunDirectory, config: Any, run: RunDirectory, rows: Sequence[Row], index: int
) -> tuple[int, int]:
    """Write the model's part of every step checkpoint; (last step, step of the best one or 0)."""
    folders = dict(reversed(retention.step_folders(source.checkpoints, recipe.checkpoint_prefix)))
    best_key = f"eval/{recipe.best_metric}"
    evaluations = [(row[best_key], row["step"]) for row in rows if row.get(best_key) is not None and row["step"] in folders]
    step, best = 0, (None, 0)
    for step, folder in folders.items():
        stacked = Checkpoint(folder)
        best = min((pair for pair in evaluations if pair[1] <= step), default=(None, 0))
        state = _trainer_state(stacked.state, index, rows, step, best)
        texts = {"trainer_state.json": json.dumps(state, indent=1), "config.yaml": configuration.to_yaml(config)}
        writing.write(run.checkpoints, folder.name, _tensors_of_model(stacked, index), texts)
    return step, best[1]


def _tensors_of_model(stacked: Checkpoint, index: int) -> dict[str, list[TensorEntry]]:
    """The model's slice of every parameter and moment, and its tasks; the optimizer's step count is that of the stack."""

    def entry(stem: str, name: str) -> TensorEntry:
        tensor = stacked.tensor(stem, name)
        if not tensor.ndim:
            return whole_entry(name, tensor)
        # Read again when it is written, so that no more than one tensor of the stack is in memory.
        return TensorEntry(name, tuple(tensor.shape[1:]), tensor.dtype, lambda _: stacked.tensor(stem, name)[index])

    entries = {stem: [entry(stem, name) for name in sorted(stacked.names(stem))] for stem in ("model", "optimizer")}
    return entries | {"tasks": whole_entries({"model_1": stacked.tensor("tasks", f"model_{index + 1}")})}


def _trainer_state(state: Row, index: int, rows: Sequence[Row], step: int, best: tuple[float | None, int]) -> Row:
    """trainer_state.json of the model: its own sums and losses, and `best`, its best evaluation that has a checkpoint."""
    of_stack = state["train_state"]
    losses = [row["train/loss"] for row in rows if row["step"] <= step and "train/loss" in row]
    evaluated = [row["eval/val_loss"] for row in rows if row["step"] == of_stack["evaluated_step"] and "eval/val_loss" in row]
    own = {
        "evaluated_metric": evaluated[-1] if evaluated else None,
        "train_loss": losses[-1] if losses else None,
        "best_metric": best[0],
        "best_step": best[1],
        "patience_best": best[0],
        "evaluations_without_improvement": sum("eval/val_loss" in row and best[1] < row["step"] <= step for row in rows),
    }
    own |= {name: of_stack[name][index : index + 1] for name in ("loss_sums", "item_counts")}
    return {**state, "train_state": {**of_stack, **own}}
