"""Many training runs in one launch, because a launch takes seconds, and a run of the toy recipe a few tenths.

`launch` starts it and returns the runs. In each of its processes `train_all` connects once, trains the runs of a JSON file one
after another through `trainer.main.train`, and writes down how each ended.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch_server import launch_forked
from launching import environment, keep_imports_frozen, processes_of
from safetensors.torch import load_file
from torch import Tensor

Argv = list[str]
TOY = "toy_recipe:ToyRecipe"


@dataclass(frozen=True)
class Finished:
    """One run of a launch, read from its run directory."""

    path: Path
    outcomes: list[dict[str, Any]]
    """by rank, how the run ended: {"reason": str | None, "exit_code": int, "message": str}"""

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str) -> dict[int, float | None]:
        """{step: value} of a metric; None where it was not finite."""
        return {row["step"]: row[name] for row in self.rows() if name in row}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return sorted(self._checkpoints())

    def tensors(self, stem: str, step: int) -> dict[str, Tensor]:
        """`model` or `optimizer` of the checkpoint of a step."""
        return load_file(self._checkpoints()[step] / f"{stem}.safetensors")

    def _checkpoints(self) -> dict[int, Path]:
        """{step: folder}, whatever the recipe calls them."""
        folders = (folder for folder in (self.path / "checkpoints").glob("*_[0-9]*") if not folder.is_symlink())
        return {int(folder.name.rpartition("_")[2]): folder for folder in folders if (folder / "manifest.json").is_file()}


def launch(
    kind: str, runs: Mapping[str, tuple[str, Argv]], folder: Path, runs_folder: Path | None = None
) -> dict[str, Finished]:
    """Train `runs` {name: (module:class of a recipe, command line)} in one launch of `kind`. Returns {name: run}.

    `folder` is for the launch's files; each run has its own directory below `runs_folder` (default: `folder`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs_folder = runs_folder or folder
    command_lines = {name: (recipe, [*argv, "--output_dir", str(runs_folder / name)]) for name, (recipe, argv) in runs.items()}
    (folder / "runs.json").write_text(json.dumps(command_lines))
    launch_forked(kind, folder, environment(SAMECURVE_CACHE=str(folder / "cache")))
    ranks = sorted(folder.glob("rank*.json"))
    assert len(ranks) == processes_of(kind), f"{kind} started {len(ranks)} processes"
    outcomes_by_rank = [json.loads(path.read_text()) for path in ranks]
    return {name: Finished(runs_folder / name, [outcomes[name] for outcomes in outcomes_by_rank]) for name in runs}


def recipe_of(path: str) -> Any:
    """An instance of the recipe `module:class`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)()


def planned(recipe: Any, argv: Argv) -> Any:
    """The configuration that a run with this command line begins with."""
    from trainer.checkpoints.init_from import with_settings
    from trainer.command_line import config

    return with_settings(recipe, config.parse(recipe.config_class, recipe.presets, argv, recipe.name), argv).config


def train_all(folder: Path) -> None:
    """In each process of a launch: train the runs of `folder`/runs.json, write the outcomes to rank{rank}.json, and exit."""
    from trainer.backends import backend_of
    from trainer.checkpoints import saving
    from trainer.checkpoints.writing import SHARD_BYTES, RankWriter
    from trainer.command_line import config
    from trainer.distributed.launch import connect
    from trainer.distributed.signals import leave
    from trainer.errors import UserError
    from trainer.main import train
    from trainer.reporting.console import Console

    connected = connect("cpu", 3.0, backend_of(os.environ).before_connect)
    keep_imports_frozen()
    outcomes = {}
    for name, (path, argv) in json.loads((folder / "runs.json").read_text()).items():
        recipe, console = recipe_of(path), Console(None, connected.is_main)
        saving.RankWriter = partial(RankWriter, shard_bytes=getattr(recipe, "shard_bytes", SHARD_BYTES))  # type: ignore[misc]
        console.log(f"----- {name}")
        outcome = {"reason": None, "exit_code": 0, "message": ""}
        try:
            parsed = config.parse(recipe.config_class, recipe.presets, argv, recipe.name)
            outcome["reason"] = train(recipe, parsed, argv, connected, console)
        except UserError as error:
            outcome |= {"exit_code": error.exit_code, "message": str(error)}
        console.close()
        outcomes[name] = outcome
    (folder / f"rank{connected.rank}.json").write_text(json.dumps(outcomes))
    leave(0)
