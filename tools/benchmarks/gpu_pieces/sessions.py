"""Two contenders, the trainer's loop and a bare loop of the same network; and where and with what configuration they run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.gpu_pieces.contenders import Contender, Steps, StepsHere
from benchmarks.gpu_pieces.results import ResultFile
from trainer.backends import backend_of
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.network import build_network
from trainer.checkpoints.resume import LaunchPlan
from trainer.data import loader, stream
from trainer.distributed.launch import Launch, connect, resolve_precision
from trainer.distributed.stopping import StopRequests
from trainer.distributed.time_limit import TimeLimit
from trainer.evaluation.objective import Objective, objective_weights
from trainer.loop import Training
from trainer.recipe import Recipe
from trainer.reporting.alerts import Alerts
from trainer.reporting.console import Console
from trainer.reporting.run_directory import RunDirectory
from trainer.setup import Session, set_up

T = TypeVar("T")
QUIET: dict[str, Any] = {
    "num_workers": 0,
    "eval_every": 0,
    "save_every": 0,
    "save_epochs": 0,
    "alert_every": 0,
    "use_tensorboard": False,
    "max_training_hours": None,
    "max_steps": 1_000_000,
}
"""flags for training without end, evaluation, saves or reports"""


@dataclass(frozen=True)
class Place:
    """Where a piece runs, and how long it may take."""

    launch: Launch
    folder: Path
    """for its files; removed afterwards"""
    results: ResultFile
    rehearse: bool
    """whether everything is small and on a CPU"""
    until: float = math.inf
    """time on the monotonic clock at which the process will be killed"""

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.launch.device

    def size(self, real: T, rehearsed: T) -> T:
        """`rehearsed` in a rehearsal, else `real`."""
        return rehearsed if self.rehearse else real

    def new_folder(self) -> Path:
        """A path in `folder` that does not exist yet."""
        return next(path for number in itertools.count() if not (path := self.folder / f"run{number}").exists())


@functools.cache
def connected(rehearse: bool) -> Launch:
    """This process's launch; processes are connected at the first call."""
    import os

    return connect("cpu" if rehearse else "auto", 5.0, backend_of(os.environ).before_connect)


def configured(recipe: Recipe, **values: Any) -> Any:
    """The recipe's default configuration with QUIET and `values`, {name of a flag: value}. TypeError for an unknown flag.

    It is built without the command line, because its library may not be installed.
    """
    config, values = recipe.config_class(), QUIET | values
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(part) if field.name in values}
        config = dataclasses.replace(config, **{section.name: dataclasses.replace(part, **own)})
    if values:
        raise TypeError(f"{recipe.name} has no {', '.join(values)}")
    return config.resolved() if hasattr(config, "resolved") else config


class StepWatch(TimeLimit):
    """No limit; calls `step_done` after each step of the loop."""

    def __init__(self, step_done: Callable[[], None]) -> None:
        super().__init__(None, time.monotonic())
        self._step_done = step_done

    def record_step(self, seconds: float) -> None:
        """Called by the loop at the end of each step."""
        super().record_step(seconds)
        self._step_done()


class OurLoop(Contender):
    """`trainer.loop.Training`, set up by `trainer.setup.set_up` like any run, but without evaluation and output."""

    def __init__(self, recipe: Recipe, config: Any, launch: Launch, folder: Path, checkpoint: Path | None = None) -> None:
        saved = Checkpoint(checkpoint) if checkpoint else None
        plan = LaunchPlan(config, RunDirectory(folder), saved, False, frozenset({"warmup_steps"}))
        self.messages: list[str] = []
        session = set_up(recipe, plan, launch, self.messages.append)
        session.data.evaluation.clear()
        console = Console(None, is_main=False)
        stops = StopRequests(StepWatch(self.step_done), None, str, console.log)
        self.training: Training | None = Training(session, plan, stops, None, console, Alerts())
        super().__init__(self.training.run)

    @property
    def session(self) -> Session:
        """The session of the loop."""
        assert self.training is not None
        return self.training.session

    def close(self) -> None:
        """End the loop."""
        super().close()
        self.training = None


def bare_loop(recipe: Recipe, config: Any, launch: Launch, compile_mode: str | None = "default") -> Contender:
    """The shortest loop that trains the same network with the same loss, batches and optimizer: the yardstick for ours.

    `compile_mode`: of torch.compile; None: not compiled.
    """
    o, device = config.optimisation, launch.device
    data = recipe.build_data(config)
    network = build_network(recipe, config, data).to(device)
    order = stream.TrainingOrder(o.batch_size, 0, 1, o.seed, stream.length_of(data.train), first_micro_batch=0)
    batches = loader.read(data.train, order, config.run, device)
    first = next(batches)
    counts = recipe.items(first)
    weights = objective_weights(recipe, config, counts)
    objective = Objective(network, recipe, list(counts)).train()
    optimizer = recipe.optimizer(network, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scale = torch.tensor([weights[term] / max(1, n) for term, n in counts.items()], device=device)
    precision = resolve_precision(config.run.mixed_precision, launch)
    if compile_mode is not None:
        objective.compile(mode=None if compile_mode == "default" else compile_mode)

    def step() -> None:
        batch = loader.to_device(next(batches), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            sums = objective(batch)
        (sums * scale).sum().backward()
        if o.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return StepsHere(step) if compile_mode == "reduce-overhead" else Steps(step)


def random_ids(path: Path, count: int, vocab_size: int) -> Path:
    """Write `count` random uint16 ids below `vocab_size`; small ones are likelier, so that there is something to learn."""
    random = np.random.default_rng(0)
    ids = np.minimum(random.integers(0, vocab_size, count), random.integers(0, vocab_size, count))
    ids.astype(np.uint16).tofile(path)
    return path
