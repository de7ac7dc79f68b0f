"""Networks without a backend: built with fresh weights, filled from a checkpoint, evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from trainer.backends.tensors import saved_buffers
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.command_line import config as configuration
from trainer.data.bad_samples import first_batch
from trainer.data.seeding import seed_generators
from trainer.distributed.launch import Launch, resolve_precision
from trainer.errors import CHECKPOINT, UserError, one_line
from trainer.evaluation.exact import evaluate
from trainer.evaluation.objective import Objective, objective_weights
from trainer.recipe import ConfigT, Data, Recipe


def build_network(recipe: Recipe[ConfigT], config: Any, data: Data) -> nn.Module:
    """The bare network, on the host, with fresh weights from the run's seed."""
    seed_generators(torch.device("cpu"), config.optimisation.seed, "initial weights")
    try:
        return recipe.build_model(config, data)
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error


def load_weights(network: nn.Module, saved: Checkpoint) -> None:
    """Copy a checkpoint's weights into a bare network. UserError, before anything is changed, listing what does not fit."""
    targets = dict(network.named_parameters()) | dict(saved_buffers(network))
    shapes = {name: saved.shape("model", name) for name in saved.names("model")}
    wrong = [
        f"{name}: {shapes.get(name, 'missing')} instead of {tuple(target.shape)}"
        for name, target in targets.items()
        if shapes.get(name) != tuple(target.shape)
    ]
    wrong += [f"{name}: not in this model" for name in sorted(set(shapes) - set(targets))]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{saved.path} holds another model: {'; '.join(wrong[:4])}{more}; give its model flags", CHECKPOINT)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved.tensor("model", name))


def find_checkpoint(recipe: Recipe[ConfigT], model_path: str, launch: Launch) -> tuple[Checkpoint, ConfigT]:
    """(the checkpoint a `--model_path` means, its configuration). As given, else below this recipe's runs, latest first.

    Collective. UserError if there is none, it is damaged, or another recipe wrote it.
    """

    def search() -> str:
        root = Path("runs", recipe.name)
        runs = sorted(root.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True) if root.is_dir() else []
        path = checkpoint.resolve(model_path, [folder for run in runs for folder in (run, run / "checkpoints")])
        candidate = Checkpoint(path)
        candidate.verify()
        written_by = candidate.state.get("recipe")
        if written_by != recipe.name:
            raise UserError(f"{path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
        return str(path)

    saved = Checkpoint(Path(launch.control.on_main(search)))
    source = f"{saved.path}/config.yaml"
    return saved, configuration.from_mapping(recipe.config_class, yaml.safe_load(saved.text("config.yaml")), source)


def load_network(recipe: Recipe[ConfigT], saved: Checkpoint, config: Any, data: Data, launch: Launch) -> nn.Module:
    """The plain network with the checkpoint's weights, on this process's device, for inference: no mode or gradient to set."""
    network = build_network(recipe, config, data)
    load_weights(network, saved)
    return network.to(launch.device).eval().requires_grad_(False)


def evaluate_network(
    recipe: Recipe[ConfigT], network: nn.Module, config: Any, dataset: Any, launch: Launch, batch_size: int
) -> dict[str, float]:
    """What the recipe measures on `dataset`, in full, exact on any number of processes. Collective."""
    whole = replace(config.run, eval_iters=0, bad_samples="stop")  # or a sample would count twice
    weights = objective_weights(recipe, config, recipe.items(first_batch(dataset, [0], whole)))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(config.run.mixed_precision, launch))
    with torch.autocast(launch.device.type, kind, enabled=kind is not None):
        result = evaluate(Objective(network, recipe, list(weights)), recipe, weights, dataset, batch_size, whole, launch)
    assert result is not None
    return result
