"""The trainer's own loop, and a bare loop of the same network, as contenders; and the recipes on data made on the spot."""

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
"""nothing but training, without end"""


@dataclass(frozen=True)
class Place:
    """Where a piece runs."""

    launch: Launch
    folder: Path
    """for its files; removed afterwards"""
    results: ResultFile
    rehearse: bool
    """everything small, on a CPU"""
    until: float = math.inf
    """when the process is ended, on the monotonic clock"""

    @property
    def device(self) -> torch.device:
        """The one that is measured."""
        return self.launch.device

    def size(self, real: T, rehearsed: T) -> T:
        """One of the two."""
        return rehearsed if self.rehearse else real

    def new_folder(self) -> Path:
        """An empty one."""
        return next(path for number in itertools.count() if not (path := self.folder / f"run{number}").exists())


@functools.cache
def connected(rehearse: bool) -> Launch:
    """This process's launch; once."""
    import os

    return connect("cpu" if rehearse else "auto", 5.0, backend_of(os.environ).before_connect)


def configured(recipe: Recipe, **values: Any) -> Any:
    """The recipe's default configuration with these values, by the names of the flags; TypeError for one it does not have.

    Without the command line, whose library need not be there.
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
    """No limit; the loop tells it of every step."""

    def __init__(self, step_done: Callable[[], None]) -> None:
        super().__init__(None, time.monotonic())
        self._step_done = step_done

    def record_step(self, seconds: float) -> None:
        """Called at the end of each step."""
        super().record_step(seconds)
        self._step_done()


class OurLoop(Contender):
    """`trainer.loop.Training`, set up by `trainer.setup.set_up` as for any run; no evaluation, nothing printed."""

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
        """What the loop works with."""
        assert self.training is not None
        return self.training.session

    def close(self) -> None:
        """End the loop."""
        super().close()
        self.training = None


def bare_loop(recipe: Recipe, config: Any, launch: Launch, compile_mode: str | None = "default") -> Contender:
    """The same network, loss, batches and optimizer in the shortest loop that trains: what any trainer is measured against.

    `compile_mode` None: not compiled.
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
    """A file of so many uint16 ids, small ones likelier, so that there is something to learn."""
    random = np.random.default_rng(0)
    ids = np.minimum(random.integers(0, vocab_size, count), random.integers(0, vocab_size, count))
    ids.astype(np.uint16).tofile(path)
    return path
