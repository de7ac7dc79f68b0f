"""The task-diversity experiment of Raventós et al. 2023: the same model trained on pools of more and more tasks.

`sweep` is a driver: each model is trained by the recipe's ordinary command in a process of its own, in a run directory below
the sweep's. A sweep that was stopped is continued by the same command. Results are collected in results.jsonl and plotted.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from recipes.commands.regression_evaluation import Results
from recipes.experiments import job_queue
from recipes.experiments.job_queue import Job
from recipes.experiments.sweep_models import RECIPE_FILE, SweepModel, read_results
from trainer.command_line import config as configuration
from trainer.command_line.locations import Existing, ToMake
from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Log, Recipe
from trainer.reporting.run_directory import write_text_atomic

if TYPE_CHECKING:
    from trainer.command_line.config import Parsed
    from trainer.distributed.launch import Launch

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Sweep:
    """Train one model for each number of tasks and task size, compare each with ridge and dMMSE, and plot the results."""

    tasks: tuple[int, ...] = tuple(2**i for i in range(16))
    """numbers of pretraining tasks (0: infinitely many)"""
    task_size: tuple[int, ...] = (16,)
    """dimensions of a task"""
    steps: Annotated[int | None, arg(aliases=("--max_steps",))] = None
    """optimizer steps of each model (default of this and the following: as in `train`)"""
    batch: Annotated[int | None, arg(aliases=("--batch_size",))] = None
    """sequences per optimizer step"""
    eval_batch: int | None = None
    """sequences of one forward when a trained model is evaluated"""
    eval_sequences: int | None = None
    """fresh sequences per distribution to evaluate it on"""
    examples: int | None = None
    """pairs (x, y) in a sequence"""
    noise: float | None = None
    """variance of y around w.x"""
    lr: Annotated[float | None, arg(aliases=("--learning_rate",))] = None
    """peak learning rate of the one cycle"""
    checkpoints: int | None = None
    """checkpoints of each run"""
    config: Annotated[str | None, Existing] = None
    """a YAML file with further flags of `train`, for every model"""
    preset: str | None = None
    """`quick`: a small experiment for two CPU cores"""
    parallel: bool = False
    """train several models at a time: job i on GPU i mod N; without GPUs, on N processes that share the cores"""
    gpus: int | None = None
    """N (default: all GPUs; without any, as many processes as there are cores or models)"""
    stacked: bool = False
    """train all models of a task size as one network, in one process"""
    job: int | None = None
    """train only the model of this number, from 0 (default: $SLURM_ARRAY_TASK_ID in a Slurm array; otherwise all)"""
    output_dir: Annotated[str | None, ToMake] = None
    """where the run directories go (default: runs/pfn_raventos/sweep-SETTINGS)"""
    out: Annotated[str, ToMake] = "plots/raventos_experiment.png"
    """file of the plot: .png, .pdf or .svg"""


@dataclass(frozen=True)
class Plot:
    """Plot the results of a sweep again, without training."""

    results: Annotated[str, Existing]
    """results.jsonl of a sweep, or a folder with run directories (of a Slurm array)"""
    out: Annotated[str, ToMake] = "plots/raventos_experiment.png"
    """file of the plot: .png, .pdf or .svg"""


def plot(recipe: Recipe, flags: Plot, launch: Launch, log: Log) -> None:
    """The `plot` sub-command; rank 0 does the work."""

    def on_main() -> None:
        _check_out(flags.out)
        plot_results(collect_results(Path(flags.results)), Path(flags.out), log)

    launch.control.on_main(on_main)


def sweep(recipe: Recipe, flags: Sweep, launch: Launch, log: Log) -> None:
    """The `sweep` sub-command, in one process. UserError (exit 1) if jobs have failed."""
    if launch.processes > 1:
        raise UserError(
            f"sweep starts processes of its own and was itself started in {launch.processes}; start it plainly: "
            f"python recipes/{RECIPE_FILE.name} sweep --parallel",
            known_to_all=True,
        )
    import torch

    _check_out(flags.out)
    models = plan(recipe, flags)
    folder = models[0].directory.parent
    job_number = _job_number(flags, len(models))
    one_job = job_number is not None  # one job needs one device, whatever a preset sets for the whole sweep
    available = torch.cuda.device_count() if launch.device.type == "cuda" else 0
    queues = job_queue.environments(
        parallel=flags.parallel and not one_job,
        gpus=None if one_job else flags.gpus,
        available_gpus=available,
        jobs=len(models),
    )
    log(f"Sweep: {len(models)} models in {folder}, {len(queues)} at a time")
    if job_number is not None:
        model = models[job_number]
        log(f"Job {job_number} of 0 to {len(models) - 1}: {model.name}")
        if _all_done(job_queue.run([model.job()], queues, log), log):
            log(f"Once all jobs are done: plot --results {folder} --out {flags.out}")
        return
    if flags.stacked:
        from recipes.experiments.stacked_sweep import train_stacked

        if not _all_done(train_stacked(recipe, models, queues, log), log):
            return

    def on_done(job: Job) -> None:
        error = read_results(job.directory)["true"]["error_y"]["model"]
        log(f"{job.name}: error on new tasks {error['mean']:.4f} ± {error['se']:.4f}")
        write_results(folder, [model.directory for model in models])

    if _all_done(job_queue.run([model.job() for model in models], queues, log, on_done), log):
        plot_results([read_results(model.directory) for model in models], Path(flags.out), log)


def _check_out(out: str) -> None:
    """UserError if the plot could not be written, before anything is trained for it."""
    from trainer.reporting.plot import check_picture

    try:
        check_picture(Path(out))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}") from None


def _all_done(states: dict[str, job_queue.State], log: Log) -> bool:
    """Whether all jobs are done; if not, logs which. UserError (exit 1) if some have failed."""
    not_done = job_queue.summary(states)
    if not_done and "failed" in states.values():
        raise UserError(f"{not_done}; the same command goes on with what is not done", exit_code=1)
    if not_done:
        log(f"{not_done}. The same command goes on.")
    return not_done is None


def plan(recipe: Recipe, flags: Sweep) -> list[SweepModel]:
    """The models of a sweep, task sizes outermost. UserError, before anything starts, for flags that `train` would refuse."""
    passed_on = ("preset", "config", "steps", "batch", "eval_batch", "eval_sequences", "examples", "noise", "lr", "checkpoints")
    common = [f"--{name}={getattr(flags, name)}" for name in passed_on if getattr(flags, name) is not None]

    def parsed(*more: str) -> Parsed:
        return configuration.parse(recipe.config_class, recipe.presets, [*common, *more], recipe.name)

    if not flags.tasks or not flags.task_size:
        raise UserError("tasks and task_size need at least one number each")
    for name, numbers in (("tasks", flags.tasks), ("task_size", flags.task_size)):
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{name} {' '.join(map(str, numbers))} names a number twice; give each once")
    if parsed().config.run.eval_sequences < 2:
        raise UserError("a sweep compares its models on fresh sequences; give --eval_sequences 10000")
    folder = Path(flags.output_dir or Path("runs", recipe.name, f"sweep-{configuration.run_name(parsed())}"))
    models = []
    for size, number in itertools.product(flags.task_size, flags.tasks):
        arguments = (*common, "--num_tasks", str(number), "--task_size", str(size), "--wandb_group", folder.name)
        name = f"tasks{number}-size{size}"
        models.append(SweepModel(name, folder / name, arguments, parsed(*arguments).config))
    for model in models:
        model.check_directory()
    return models


def _job_number(flags: Sweep, jobs: int) -> int | None:
    """The job that this process is limited to, by --job or as part of a Slurm array."""
    number = flags.job if flags.job is not None else os.environ.get("SLURM_ARRAY_TASK_ID")
    if number is None:
        return None
    if flags.stacked:
        raise UserError("one job of a sweep is a single model; leave --stacked out")
    if not 0 <= int(number) < jobs:
        raise UserError(f"job {number}: this sweep has the jobs 0 to {jobs - 1} (sbatch --array=0-{jobs - 1})")
    return int(number)


def write_results(folder: Path, directories: Sequence[Path]) -> None:
    """results.jsonl: a line for each model evaluated so far, in the order of the sweep. UserError (exit 5) on a full disk."""
    rows = [read_results(directory) for directory in directories if (directory / "evaluation.json").is_file()]
    try:
        write_text_atomic(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{folder / RESULTS} could not be written: {error.strerror}", CHECKPOINT) from None


def collect_results(path: Path) -> list[Results]:
    """The results in a results.jsonl, or of the run directories in a folder. UserError if there are none."""
    if path.is_dir():
        rows = [read_results(file.parent) for file in sorted(path.glob("*/evaluation.json"))]
    else:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--results {path} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"--results {path} holds no results; give the results.jsonl of a sweep, or the folder of its runs")
    if not all(isinstance(row, dict) and {"num_tasks", "task_size", "true", "pretraining"} <= row.keys() for row in rows):
        raise UserError(f"--results {path} holds something else than the results of a sweep")
    for key in ("examples", "trained_examples", "noise", "step", "sequences"):
        if len(different := {row.get(key) for row in rows}) > 1:
            values = " and ".join(sorted(map(str, different)))
            raise UserError(f"--results {path} holds models with {key} {values}; plot those of each {key} apart")
    models = [(row["num_tasks"], row["task_size"]) for row in rows]
    for num_tasks, task_size in models:
        if models.count((num_tasks, task_size)) > 1:
            raise UserError(f"--results {path} holds two models of {num_tasks} tasks of size {task_size}; keep one of them")
    return rows


def plot_results(rows: Sequence[Results], out: Path, log: Log) -> None:
    """Plot the results, and log the thresholds estimated from them. UserError if the plot cannot be written."""
    from recipes.experiments.task_diversity_plot import plot_experiment

    try:
        thresholds = plot_experiment(rows, out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}") from None
    for size, threshold in thresholds.items():
        estimate = "cannot be estimated from these models" if threshold is None else f"about {threshold:.0f}"
        log(f"D = {size}: task-diversity threshold M* {estimate}")
    log(f"Plot: {out}")
