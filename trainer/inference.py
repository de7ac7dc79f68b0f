"""A trained model from its checkpoint, in the plain network: no optimizer, no backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from trainer import checkpoint, config
from trainer.checkpoint import Checkpoint
from trainer.errors import Refusal
from trainer.evaluation import Objective, evaluate
from trainer.launch import Launch, precision
from trainer.recipe import Data, Recipe
from trainer.setup import build_network, load_weights


def find(recipe: Recipe, model_path: str, launch: Launch) -> tuple[Checkpoint, Any]:
    """(the checkpoint a `--model_path` means, its configuration). As given, else below this recipe's runs, latest first.

    Collective. Refusal if there is none, it is damaged, or another recipe wrote it.
    """

    def search() -> str:
        root = Path("runs", recipe.name)
        runs = sorted(root.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True) if root.is_dir() else []
        path = checkpoint.resolve(model_path, [folder for run in runs for folder in (run, run / "checkpoints")])
        found = Checkpoint(path)
        found.verify()
        if found.state.get("recipe") != recipe.name:
            by = found.state.get("recipe")
            raise Refusal(f"{path} was written by recipe {by!r}, not {recipe.name!r}; choose another checkpoint")
        return str(path)

    found = Checkpoint(Path(launch.control.on_main(search)))
    source = f"{found.path}/config.yaml"
    return found, config.from_mapping(recipe.Config, yaml.safe_load(found.text("config.yaml")), source)


def load(recipe: Recipe, found: Checkpoint, settings: Any, data: Data, launch: Launch) -> nn.Module:
    """The plain network with the checkpoint's weights, in evaluation mode."""
    network = build_network(recipe, settings, data)
    load_weights(network, found)
    return network.to(launch.device).eval()


def evaluate_trained(
    recipe: Recipe, network: nn.Module, settings: Any, dataset: Any, launch: Launch, batch_size: int
) -> dict[str, float]:
    """What the recipe measures on `dataset`, in full, exact on any number of processes. Collective."""
    first = dataset.__getitems__([0])
    given = recipe.loss_weights(settings)
    weights = {term: float(given.get(term, 1.0)) for term in recipe.items(first)}
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(settings.run.mixed_precision, launch))
    whole = replace(settings.run, eval_iters=0)
    with torch.autocast(launch.device.type, kind, enabled=kind is not None):
        result = evaluate(Objective(network, recipe, list(weights)), recipe, weights, dataset, batch_size, whole, launch)
    assert result is not None
    return result


def on_main(launch: Launch, action: Callable[[], None]) -> None:
    """Do on rank 0 what only one process should; the others wait."""
    if launch.is_main:
        with torch.no_grad():
            action()
    launch.control.barrier()
