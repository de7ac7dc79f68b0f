"""The models of a task-diversity sweep: where each is trained, by which command, and its evaluation."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.commands.regression_evaluation import Results
from recipes.experiments.job_queue import Job
from trainer.command_line import config as configuration
from trainer.errors import UserError
from trainer.reporting.run_directory import RunDirectory

RECIPE_FILE = Path(__file__).parents[1] / "pfn_raventos.py"


@dataclass(frozen=True)
class SweepModel:
    """One model of a sweep."""

    name: str
    directory: Path
    arguments: tuple[str, ...]
    """of `train`, without --output_dir"""
    config: Any

    def check_directory(self) -> None:
        """UserError if its run directory holds a run with other settings."""
        path = RunDirectory(self.directory).config
        if not path.is_file():
            return
        texts = (path.read_text(encoding="utf-8"), configuration.to_yaml(self.config))
        saved, asked = (configuration.from_mapping(type(self.config), yaml.safe_load(text), str(path)) for text in texts)
        for name, (old, new) in configuration.changed(asked, saved, ("model", "data", "optimisation")).items():
            raise UserError(f"{name}: {self.directory} holds a run with {old}, asked for {new}; choose another --output_dir")

    def is_trained(self) -> bool:
        """Whether its run has reached its last step."""
        return is_finished(self.directory)

    def is_evaluated(self) -> bool:
        """Whether it has been evaluated, on as many sequences as configured."""
        try:
            return read_results(self.directory)["sequences"] == self.config.run.eval_sequences
        except (UserError, KeyError):
            return False

    def job(self) -> Job:
        """The job left to do: training, which ends with the evaluation, or the evaluation alone."""
        recipe = [sys.executable, str(RECIPE_FILE)]
        command = [*recipe, "train", *self.arguments, "--output_dir", str(self.directory)]
        if self.is_trained():
            run = self.config.run
            final = self.directory / "checkpoints" / "checkpoint_final"
            command = [*recipe, "evaluate", "--model_path", str(final), "--out", str(self.directory / "evaluation.json")]
            command += ["--eval_sequences", str(run.eval_sequences), "--eval_batch", str(run.eval_batch)]
            command += ["--device", run.device]
        return Job(self.name, command, self.directory, self.is_evaluated)


def is_finished(directory: Path) -> bool:
    """Whether the run in a run directory has reached its end."""
    try:
        return json.loads(RunDirectory(directory).status.read_text())["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def read_results(directory: Path) -> Results:
    """The evaluation of the model in a run directory. UserError if there is none that can be read."""
    path = directory / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); the model has not been evaluated yet") from None


def check_stack(config: Any) -> None:
    """UserError for settings under which the models of a stack would not train as each does alone."""
    pools, o, run = config.data.stack, config.optimisation, config.run
    if len(set(pools)) < len(pools):
        raise UserError(f"stack {' '.join(map(str, pools))} names a number of tasks twice; give each once")
    if o.optimizer == "muon":
        raise UserError("muon takes matrices, and stacked models have them in one tensor of three dimensions; use adam")
    if run.patience or run.target_loss is not None:
        name = "patience" if run.patience else "target_loss"
        raise UserError(f"{name} would watch the sum of all stacked models' losses; leave it out")
    if o.grad_clip:
        raise UserError(f"grad_clip {o.grad_clip:g} would couple the stacked models through their common norm; leave it at 0")
