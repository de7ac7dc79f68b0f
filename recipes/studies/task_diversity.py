"""The task-diversity experiment of Raventós et al. 2023: the same model trained on pools of more and more tasks.

`sweep` is a driver. Each model is trained by the recipe's ordinary command in a process of its own, in a run directory below
the sweep's, so a sweep that was stopped goes on where it was. Their results are gathered in results.jsonl and drawn.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from tyro.conf import arg

from recipes.studies.regression_evaluation import Results
from trainer import config as configuration
from trainer import job_queue
from trainer.errors import CHECKPOINT, Refusal
from trainer.job_queue import Job
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory, write_text_atomic

if TYPE_CHECKING:
    from trainer.config import Parsed
    from trainer.launch import Launch

Say = Callable[[str], None]
RECIPE_FILE = Path(__file__).parents[1] / "pfn_raventos.py"
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Sweep:
    """Train one model for each number of tasks and task size, compare each with ridge and dMMSE, and draw the picture."""

    tasks: tuple[int, ...] = tuple(2**i for i in range(16))
    """numbers of pretraining tasks (0: infinitely many)"""
    task_size: tuple[int, ...] = (16,)
    """dimensions of a task"""
    steps: Annotated[int | None, arg(aliases=("--max_steps",))] = None
    """optimizer steps of each model (default of this and the following: as in `train`)"""
    batch: Annotated[int | None, arg(aliases=("--batch_size",))] = None
    """sequences per optimizer step"""
    eval_batch: int | None = None
    """sequences of one forward when a trained model is measured"""
    eval_sequences: int | None = None
    """fresh sequences per distribution to measure it on"""
    examples: int | None = None
    """pairs (x, y) in a sequence"""
    noise: float | None = None
    """variance of y around w.x"""
    lr: Annotated[float | None, arg(aliases=("--learning_rate",))] = None
    """peak learning rate of the one cycle"""
    checkpoints: int | None = None
    """checkpoints of each run"""
    config: str | None = None
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
    """do only the job of this number, from 0 (default: $SLURM_ARRAY_TASK_ID in a Slurm array; otherwise all)"""
    output_dir: str | None = None
    """where the run directories go (default: runs/pfn_raventos/sweep-SETTINGS)"""
    out: str = "plots/raventos_experiment.png"
    """the picture: .png, .pdf or .svg"""


@dataclass(frozen=True)
class Plot:
    """Draw the picture of a sweep again, without training."""

    results: str
    """results.jsonl of a sweep, or a folder with run directories (of a Slurm array)"""
    out: str = "plots/raventos_experiment.png"
    """the picture: .png, .pdf or .svg"""


def plot(recipe: Recipe, flags: Plot, launch: Launch, say: Say) -> None:
    """The `plot` sub-command: on rank 0."""

    def act() -> None:
        _check_out(flags.out)
        draw(gather(Path(flags.results)), Path(flags.out), say)

    launch.control.on_main(act)


def sweep(recipe: Recipe, flags: Sweep, launch: Launch, say: Say) -> None:
    """The `sweep` sub-command: a driver, which is one process. Refusal (exit 1) if jobs have failed."""
    if launch.processes > 1:
        raise Refusal(
            f"sweep starts processes of its own and was itself started in {launch.processes}; start it plainly: "
            f"python recipes/{RECIPE_FILE.name} sweep --parallel",
            known_to_all=True,
        )
    import torch

    _check_out(flags.out)
    models = plan(recipe, flags)
    folder = models[0].directory.parent
    only = _only(flags, len(models))
    gpus = torch.cuda.device_count() if launch.device.type == "cuda" else 0
    alone = only is not None  # one job needs one device, whatever a preset says of the whole sweep
    queues = job_queue.environments(flags.parallel and not alone, None if alone else flags.gpus, gpus, len(models))
    say(f"Sweep: {len(models)} models in {folder}, {len(queues)} at a time")
    if only is not None:
        chosen = models[only]
        say(f"Job {only} of 0 to {len(models) - 1}: {chosen.name}")
        if _all_done(job_queue.run([chosen.job()], queues, say), say):
            say(f"Once all jobs are done: plot --results {folder} --out {flags.out}")
        return
    if flags.stacked:
        from recipes.studies.stacked_sweep import train_stacked

        if not _all_done(train_stacked(recipe, models, queues, say), say):
            return

    def ended(job: Job) -> None:
        error = results_of(job.directory)["true"]["error_y"]["model"]
        say(f"{job.name}: error on new tasks {error['mean']:.4f} ± {error['se']:.4f}")
        write_results(folder, [model.directory for model in models])

    if _all_done(job_queue.run([model.job() for model in models], queues, say, ended), say):
        draw([results_of(model.directory) for model in models], Path(flags.out), say)


def _check_out(out: str) -> None:
    """Refusal if the picture could not be written, before anything is trained for it."""
    from trainer.plot import check_picture

    try:
        check_picture(Path(out))
    except (OSError, ValueError) as error:
        raise Refusal(f"--out {out}: {error}") from None


def _all_done(states: dict[str, job_queue.State], say: Say) -> bool:
    """Whether all jobs are done; says which are not. Refusal (exit 1) if some have failed."""
    left = job_queue.summary(states)
    if left and "failed" in states.values():
        raise Refusal(f"{left}; the same command goes on with what is not done", exit_code=1)
    if left:
        say(f"{left}. The same command goes on.")
    return left is None


@dataclass(frozen=True)
class PlannedModel:
    """One model of a sweep."""

    name: str
    directory: Path
    arguments: tuple[str, ...]
    """of `train`, without --output_dir"""
    config: Any

    def check_directory(self) -> None:
        """Refusal if its run directory holds a run with other settings."""
        path = RunDirectory(self.directory).config
        if not path.is_file():
            return
        saved = configuration.from_mapping(type(self.config), yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        for name, (old, new) in configuration.changed(self.config, saved, ("model", "data", "optimisation")).items():
            raise Refusal(f"{name}: {self.directory} holds a run with {old}, asked for {new}; choose another --output_dir")

    def trained(self) -> bool:
        """Whether its run has reached its last step."""
        try:
            return json.loads(RunDirectory(self.directory).status.read_text())["state"] == "finished"
        except (OSError, ValueError, KeyError):
            return False

    def evaluated(self) -> bool:
        """Whether it has been measured on as many sequences as asked for."""
        try:
            return results_of(self.directory)["sequences"] == self.config.run.eval_sequences
        except (Refusal, KeyError):
            return False

    def job(self) -> Job:
        """What is left to do for it: training, which ends with the measurement, or only that."""
        recipe = [sys.executable, str(RECIPE_FILE)]
        command = [*recipe, "train", *self.arguments, "--output_dir", str(self.directory)]
        if self.trained():
            run = self.config.run
            final = self.directory / "checkpoints" / "checkpoint_final"
            command = [*recipe, "evaluate", "--model_path", str(final), "--out", str(self.directory / "evaluation.json")]
            command += ["--eval_sequences", str(run.eval_sequences), "--eval_batch", str(run.eval_batch)]
            command += ["--device", run.device]
        return Job(self.name, command, self.directory, self.evaluated)


def plan(recipe: Recipe, flags: Sweep) -> list[PlannedModel]:
    """The models of a sweep, task sizes outermost. Refusal for flags that `train` would refuse, before anything starts."""
    passed = ("preset", "config", "steps", "batch", "eval_batch", "eval_sequences", "examples", "noise", "lr", "checkpoints")
    common = [f"--{name}={getattr(flags, name)}" for name in passed if getattr(flags, name) is not None]

    def parsed(*more: str) -> Parsed:
        return configuration.parse(recipe.Config, recipe.presets, [*common, *more], recipe.name)

    if not flags.tasks or not flags.task_size:
        raise Refusal("tasks and task_size need at least one number each")
    for name, given in (("tasks", flags.tasks), ("task_size", flags.task_size)):
        if len(set(given)) < len(given):
            raise Refusal(f"{name} {' '.join(map(str, given))} names a number twice; give each once")
    if parsed().config.run.eval_sequences < 2:
        raise Refusal("a sweep compares its models on fresh sequences; give --eval_sequences 10000")
    folder = Path(flags.output_dir or Path("runs", recipe.name, f"sweep-{configuration.run_name(parsed())}"))
    models = []
    for size, number in itertools.product(flags.task_size, flags.tasks):
        arguments = (*common, "--num_tasks", str(number), "--task_size", str(size))
        name = f"tasks{number}-size{size}"
        models.append(PlannedModel(name, folder / name, arguments, parsed(*arguments).config))
    for model in models:
        model.check_directory()
    return models


def _only(flags: Sweep, jobs: int) -> int | None:
    """The one job that this process is to do, if it is one of a Slurm array or was told so."""
    told = flags.job if flags.job is not None else os.environ.get("SLURM_ARRAY_TASK_ID")
    if told is None:
        return None
    if flags.stacked:
        raise Refusal("one job of a sweep is a single model; leave --stacked out")
    if not 0 <= int(told) < jobs:
        raise Refusal(f"job {told}: this sweep has the jobs 0 to {jobs - 1} (sbatch --array=0-{jobs - 1})")
    return int(told)


def results_of(directory: Path) -> Results:
    """What was measured of the model in a run directory. Refusal if there is nothing readable."""
    path = directory / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read ({error}); the model has not been evaluated yet") from None


def write_results(folder: Path, directories: Sequence[Path]) -> None:
    """results.jsonl: a line for each model measured so far, in the order of the sweep. Refusal (exit 5) on a full disk."""
    rows = [results_of(directory) for directory in directories if (directory / "evaluation.json").is_file()]
    try:
        write_text_atomic(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise Refusal(f"{folder / RESULTS} could not be written: {error.strerror}", CHECKPOINT) from None


def gather(path: Path) -> list[Results]:
    """The results in a results.jsonl, or of the run directories in a folder. Refusal if there are none."""
    if path.is_dir():
        rows = [results_of(found.parent) for found in sorted(path.glob("*/evaluation.json"))]
    else:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise Refusal(f"--results {path} cannot be read: {error}") from None
    if not rows:
        raise Refusal(f"--results {path} holds no results; give the results.jsonl of a sweep, or the folder of its runs")
    if not all(isinstance(row, dict) and {"num_tasks", "task_size", "true", "pretraining"} <= row.keys() for row in rows):
        raise Refusal(f"--results {path} holds something else than results of a sweep")
    for key in ("examples", "trained_examples", "noise", "step", "sequences"):
        if len(found := {row.get(key) for row in rows}) > 1:
            values = " and ".join(sorted(map(str, found)))
            raise Refusal(f"--results {path} holds models with {key} {values}, which are no one experiment; keep them apart")
    places = [(row["num_tasks"], row["task_size"]) for row in rows]
    for place in places:
        if places.count(place) > 1:
            raise Refusal(f"--results {path} holds two models of {place[0]} tasks of size {place[1]}; keep one of them")
    return rows


def draw(rows: Sequence[Results], out: Path, say: Say) -> None:
    """The picture, and what it estimates. Refusal if it cannot be written."""
    from recipes.studies.task_diversity_plot import plot_experiment

    try:
        thresholds = plot_experiment(rows, out)
    except (OSError, ValueError) as error:
        raise Refusal(f"--out {out}: {error}") from None
    for size, threshold in thresholds.items():
        found = "cannot be estimated from these models" if threshold is None else f"about {threshold:.0f}"
        say(f"D = {size}: task-diversity threshold M* {found}")
    say(f"Plot: {out}")
