"""Networks without a backend: built with fresh weights, filled from a checkpoint, evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.backends.tensors import StateLayout, TensorForm, buffer_entries, saved_buffers
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
    parameters, buffers = dict(network.named_parameters()), dict(saved_buffers(network))
    wanted = {name: TensorForm(tuple(p.shape), torch.float32) for name, p in parameters.items()}
    wanted |= {entry.name: TensorForm(entry.shape, entry.dtype) for entry in buffer_entries(network)}
    wrong = differences(saved, "model", wanted)
    if wrong:
        raise UserError(f"{saved.path} holds another model: {wrong}; give its model flags", CHECKPOINT)
    with torch.no_grad():
        for name, target in (parameters | buffers).items():
            target.copy_(saved.tensor("model", name, finite=name in parameters))


def differences(saved: Checkpoint, stem: str, wanted: Mapping[str, TensorForm]) -> str | None:
    """What a checkpoint's tensors do not have in common with those `wanted`, in words: names, shapes, types."""
    there = {name: saved.form(stem, name) for name in sorted(saved.names(stem))}
    wrong = [
        f"{name}: {_form_text(*there[name]) if name in there else 'missing'} instead of {_form_text(form.shape, form.dtype)}"
        for name, form in wanted.items()
        if name not in there or not form.fits(*there[name])
    ]
    wrong += [f"{name}: not in this model" for name in there if name not in wanted]
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return "; ".join(wrong[:4]) + more if wrong else None


def _form_text(shape: Sequence[int | None], dtype: torch.dtype | None) -> str:
    kind = "" if dtype == torch.float32 else f" {dtype}".replace("torch.", "")
    return f"{tuple(shape)}{kind}"


def optimizer_fits(saved: Checkpoint, layout: StateLayout) -> bool:
    """Whether a checkpoint's optimizer state is what an optimizer of this layout goes on from; False if another one wrote it.

    UserError (exit 5) where the same one did, and it does not fit: with it training would go on wrongly.
    """
    names, unused = saved.names("optimizer"), set(saved.state["parameters_without_state"])
    used = [name for name in layout.tensors if name not in unused]
    counts = {key: form for own in layout.counts.values() for key, form in own.items()}
    wanted = {f"{key}.{name}": form for name in used for key, form in layout.tensors[name].items()}
    wanted |= {key: form for key, form in counts.items() if used or key in names}
    wrong = differences(saved, "optimizer", wanted)
    if wrong and saved.state["optimizer"] != layout.optimizer:
        return False
    step = saved.train_state.step
    taken = float(saved.tensor("optimizer", "step")) if not wrong and "step" in wanted else 0.0
    if not (0 <= taken <= step and taken.is_integer()):
        wrong = f"step: {taken:g} of {step} steps"
    if wrong:
        way_out = f"choose another checkpoint, or take the weights only: --init_from {saved.path}"
        raise UserError(f"{saved.path} does not hold the state of this {layout.optimizer}: {wrong}; {way_out}", CHECKPOINT)
    return True


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
        written_by = candidate.state["recipe"]
        if written_by != recipe.name:
            raise UserError(f"{path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
        return str(path)

    saved = Checkpoint(Path(launch.control.on_main(search)))
    source = str(saved.path / checkpoint.CONFIG)
    return saved, configuration.from_mapping(recipe.config_class, saved.config, source)


def load_network(recipe: Recipe[ConfigT], saved: Checkpoint, config: Any, data: Data, launch: Launch) -> nn.Module:
    """The plain network with the checkpoint's weights, on this process's device, for inference: no mode or gradient to set."""
    network = build_network(recipe, config, data)
    load_weights(network, saved)
    return network.to(launch.device).eval().requires_grad_(False)


def evaluate_network(
    recipe: Recipe[ConfigT], network: nn.Module, config: Any, dataset: Any, launch: Launch, batch_size: int
) -> dict[str, float]:
    """What the recipe measures on `dataset`, in full, exact on any number of processes. Collective."""
    whole = dataclasses.replace(config.run, bad_samples="stop")  # or a sample would count twice
    weights = objective_weights(recipe, config, recipe.items(first_batch(dataset, [0], whole)))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(config.run.mixed_precision, launch))
    with torch.autocast(launch.device.type, kind, enabled=kind is not None):
        model = Objective(network, recipe, list(weights))
        result = evaluate(model, recipe, weights, dataset, batch_size, config.run, launch)
    assert result is not None
    return result
