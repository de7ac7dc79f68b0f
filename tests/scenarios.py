"""Many training runs in one launch: a launch costs ten seconds, a run of the toy recipe a few tenths.

As a script, under any launcher, it trains each run of a JSON file through `trainer.main.train` with one `connect()`, and each
rank writes down how every run ended. `launch` starts it, and gives back the runs as their run directories hold them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import environment, run
from safetensors.torch import load_file
from torch import Tensor

Argv = list[str]


@dataclass(frozen=True)
class Finished:
    """One run of a launch."""

    path: Path
    outcomes: list[dict[str, Any]]
    """by rank: {"reason": str | None, "exit_code": int, "message": str}"""

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str) -> dict[int, float | None]:
        """{step: value} of a metric; None where it was not finite."""
        return {row["step"]: row[name] for row in self.rows() if name in row}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        folders = (self.path / "checkpoints").glob("checkpoint_step_*")
        return sorted(int(folder.name.rpartition("_")[2]) for folder in folders if not folder.is_symlink())

    def tensors(self, stem: str, step: int) -> dict[str, Tensor]:
        """`model` or `optimizer` of the checkpoint of a step."""
        return load_file(self.path / "checkpoints" / f"checkpoint_step_{step}" / f"{stem}.safetensors")


def launch(
    kind: str, runs: Mapping[str, tuple[str, Argv]], folder: Path, runs_folder: Path | None = None
) -> dict[str, Finished]:
    """Train `runs` {name: (recipe, command line)} in one launch of `kind`, each in its own directory below `runs_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    runs_folder = runs_folder or folder
    spec = {name: (recipe, [*argv, "--output_dir", str(runs_folder / name)]) for name, (recipe, argv) in runs.items()}
    (folder / "runs.json").write_text(json.dumps(spec))
    # One thread a process: more of them wait for each other longer than they compute on tensors this small.
    env = environment(SAMECURVE_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    run(kind, Path(__file__), str(folder), log=folder / "log.txt", env=env)
    ranks = sorted(folder.glob("rank*.json"))
    assert len(ranks) == (1 if kind == "one" else 2), f"{kind} started {len(ranks)} processes"
    told = [json.loads(path.read_text()) for path in ranks]
    return {name: Finished(runs_folder / name, [outcomes[name] for outcomes in told]) for name in runs}


def train_all(folder: Path) -> None:
    """What each process of the launch does."""
    from toy_recipe import ToyRecipe

    from recipes.gpt2_wikitext import Gpt2Wikitext
    from trainer import config
    from trainer.console import Console
    from trainer.errors import Refusal
    from trainer.launch import connect, shut_down
    from trainer.main import train

    joined = connect("cpu", 3.0)
    recipes = {"toy": ToyRecipe, "gpt2": Gpt2Wikitext}
    outcomes = {}
    for name, (recipe_name, argv) in json.loads((folder / "runs.json").read_text()).items():
        recipe, console = recipes[recipe_name](), Console(None, joined.is_main)
        console.say(f"----- {name}")
        outcome = {"reason": None, "exit_code": 0, "message": ""}
        try:
            parsed = config.parse(recipe.Config, recipe.presets, argv, recipe.name)
            outcome["reason"] = train(recipe, parsed, argv, joined, console)
        except Refusal as refusal:
            outcome |= {"exit_code": refusal.exit_code, "message": str(refusal)}
        console.close()
        outcomes[name] = outcome
    (folder / f"rank{joined.rank}.json").write_text(json.dumps(outcomes))
    shut_down(joined, 0)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
