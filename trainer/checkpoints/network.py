"""Building a network, choosing its weights (fresh, of a checkpoint, of --init_from), and evaluating it without a backend."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.backends import backend_of
from trainer.backends.tensors import StateLayout, TensorForm, buffer_entries, saved_buffers
from trainer.checkpoints import checkpoint, verification
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.init_from import own_checkpoint
from trainer.checkpoints.resume import earlier_value
from trainer.checkpoints.tensor_file import TYPES
from trainer.checkpoints.verification import Verify, verified, verify_together
from trainer.command_line import config as configuration
from trainer.data.bad_samples import first_batch
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch, resolve_precision
from trainer.errors import CHECKPOINT, UserError, one_line
from trainer.evaluation.exact import evaluate
from trainer.evaluation.objective import Objective, objective_weights
from trainer.initial_weights import ALL_ROWS, Weights, build_empty, fill
from trainer.recipe import ConfigT, Data, Log, Recipe


def build_network(recipe: Recipe[ConfigT], config: Any, data: Data) -> nn.Module:
    """The bare network on the host, with the initial weights of the configuration's seed."""
    network, initial = build_empty_network(recipe, config, data)
    fill(network, initial, torch.device("cpu"))
    return network


def build_empty_network(recipe: Recipe[ConfigT], config: Any, data: Data) -> tuple[nn.Module, Weights]:
    """(the bare network on the meta device, its initial weights for the configuration's seed). UserError where that fails."""
    try:
        network, initial = build_empty(lambda: recipe.build_model(config, data), config.optimisation.seed)
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error
    kinds = {name: (p.dtype, p.is_floating_point()) for name, p in network.named_parameters()}
    kinds |= {name: (b.dtype, b.is_floating_point() or b.dtype in TYPES) for name, b in saved_buffers(network)}
    for name, (dtype, fits) in kinds.items():
        if not fits:
            raise UserError(
                f"{name} is of {dtype}, which checkpoints do not hold; keep real numbers there (torch.view_as_real), or a "
                "buffer with persistent=False"
            )
    return network, initial


def is_kept(network: nn.Module, name: str) -> bool:
    """Whether checkpoints hold a parameter: all but those in the network's `non_persistent_parameters`, frozen ones that every
    launch takes from `--init_from`."""
    return name not in getattr(network, "non_persistent_parameters", ())


def saved_weights(
    recipe: Recipe,
    network: nn.Module,
    initial: Weights,
    saved: Checkpoint,
    opened: Callable[[Path], Checkpoint],
    averaged: bool = True,
) -> Weights:
    """The weights of a checkpoint, read when used; for parameters that it does not hold, those that its run began with.

    `averaged`: take the averages of `--ema`, where the checkpoint has them. `opened`: opens and verifies the checkpoint of its
    `--init_from`. UserError naming what does not fit the network.
    """
    parameters = {name: p for name, p in network.named_parameters() if is_kept(network, name)}
    if len(parameters) < len(dict(network.named_parameters())):
        initial = named_weights(recipe, network, initial, saved.config["optimisation"]["init_from"], opened)
    wanted = {name: TensorForm(tuple(p.shape), torch.float32) for name, p in parameters.items()}
    wanted |= {entry.name: TensorForm(entry.shape, entry.dtype) for entry in buffer_entries(network)}
    wrong = differences(saved, "model", wanted)
    if wrong:
        raise UserError(f"{saved.path} holds another model: {wrong}; give its model flags", CHECKPOINT)

    def read(name: str, rows: slice = ALL_ROWS) -> Tensor:
        if name not in wanted:
            return initial(name, rows)
        if averaged and name in saved.averaged:
            return saved.tensor("optimizer", saved.averaged[name], rows=rows)
        return saved.tensor("model", name, finite=name in parameters, rows=rows)

    return read


def first_weights(
    recipe: Recipe,
    network: nn.Module,
    initial: Weights,
    resumed: Checkpoint | None,
    init_from: str | None,
    control: Control,
    log: Log,
) -> Weights:
    """The weights that this launch starts from: those of the resumed checkpoint, of --init_from, or fresh ones. Collective."""
    opened = partial(verify_together, control=control)
    if resumed is not None:
        return saved_weights(recipe, network, initial, resumed, opened, averaged=False)
    if not init_from:
        return initial
    weights = named_weights(recipe, network, initial, init_from, opened)
    for line in (f"Initial weights from {init_from}", *recipe.notes):
        log(line)
    return weights


def named_weights(
    recipe: Recipe, network: nn.Module, initial: Weights, init_from: str, opened: Callable[[Path], Checkpoint]
) -> Weights:
    """The weights that `--init_from` names, read when used: of a checkpoint, verified by `opened`, or in another format, of a
    folder or hub name."""
    folder = own_checkpoint(init_from)
    saved = None if folder is None else opened(folder)
    if saved is not None:
        kept = {name for name, _ in network.named_parameters() if is_kept(network, name)}
        # A network of which checkpoints hold adapters alone, and a checkpoint without any: one of the whole network.
        is_other = hasattr(network, "non_persistent_parameters") and kept.isdisjoint(saved.names("model"))
        if saved.state["recipe"] == recipe.name and not is_other:
            return saved_weights(recipe, network, initial, saved, opened)
        if saved.averaged:
            raise UserError(
                f"--init_from {init_from} has averages of --ema, which are lost here; give it as export_hf.py writes it"
            )
    return pretrained_weights(recipe, network, initial, str(folder or init_from))


def pretrained_weights(recipe: Recipe, network: nn.Module, initial: Weights, init_from: str) -> Weights:
    """The weights that the recipe finds under a name; they are read when used. UserError if they do not fit the network."""
    try:
        given = recipe.pretrained(init_from, network, initial)
    except (ValueError, OSError) as error:
        raise UserError(f"--init_from {init_from}: {one_line(error)}") from error
    tensors = [*network.named_parameters(), *saved_buffers(network)]
    wanted = {name: TensorForm(tuple(tensor.shape), torch.float32) for name, tensor in tensors}
    wrong = _differences({name: (stored.shape, torch.float32) for name, stored in given.items()}, wanted)  # of any type
    if wrong:
        raise UserError(f"--init_from {init_from} holds another model: {wrong}; give its model flags")
    return lambda name, rows=ALL_ROWS: given[name].read(rows) if name in given else initial(name, rows)


def differences(saved: Checkpoint, stem: str, wanted: Mapping[str, TensorForm]) -> str | None:
    """How a checkpoint's tensors differ from those `wanted` in names, shapes or dtypes, as text; None if they do not."""
    return _differences({name: saved.form(stem, name) for name in sorted(saved.names(stem))}, wanted)


def _differences(
    there: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]], wanted: Mapping[str, TensorForm]
) -> str | None:
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
    """Whether an optimizer of this layout can continue from a checkpoint's state; False if another kind of optimizer wrote it.

    UserError (exit 5) if the same kind wrote it and it does not fit: training would go on wrongly.
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
    """(the checkpoint that `--model_path` names, its configuration): a path, or a name within this recipe's latest run.

    Collective. UserError if there is none, if it is damaged, or if another recipe wrote it.
    """

    def search(verify: Verify) -> str:
        runs = [file.parent for file in Path("runs", recipe.name).glob(f"*/{checkpoint.CONFIG}")]
        runs.sort(key=lambda run: run.stat().st_mtime, reverse=True)
        folders = {f"the latest run ({run})": Path(earlier_value(run, "checkpoint_dir") or run / "checkpoints") for run in runs}
        path = checkpoint.resolve(model_path, folders)
        candidate = Checkpoint(path)
        verify(candidate)
        written_by = candidate.state["recipe"]
        if written_by != recipe.name:
            raise UserError(f"{path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
        return str(path)

    saved = Checkpoint(Path(verification.on_main(search, launch.control)))
    source = str(saved.path / checkpoint.CONFIG)
    return saved, configuration.from_mapping(recipe.config_class, saved.config, source)


def load_network(recipe: Recipe[ConfigT], saved: Checkpoint, config: Any, data: Data, device: torch.device) -> nn.Module:
    """The plain network with the checkpoint's weights on a device, for inference: in evaluation mode, without gradients."""
    network, initial = build_empty_network(recipe, config, data)
    fill(network, saved_weights(recipe, network, initial, saved, verified), device)
    return network.eval().requires_grad_(False)


def load_for_evaluation(recipe: Recipe[ConfigT], saved: Checkpoint, config: Any, data: Data, launch: Launch) -> Objective:
    """The objective with the checkpoint's weights, for `evaluate_objective`: under FSDP and ZeRO sharded over the processes."""
    network, initial = build_empty_network(recipe, config, data)
    opened = partial(verify_together, control=launch.control)
    weights = saved_weights(recipe, network, initial, saved, opened)
    objective = Objective(network, recipe)
    backend_of(os.environ).fill_for_evaluation(objective, weights, launch)
    return objective.requires_grad_(False)


def evaluate_objective(
    recipe: Recipe[ConfigT], objective: Objective, config: Any, dataset: Any, launch: Launch, batch_size: int
) -> dict[str, float]:
    """Means of what the recipe measures on all of `dataset`, the same on any number of processes. Collective."""
    whole = dataclasses.replace(config.run, bad_samples="stop")  # else the sample that replaces another would count twice
    weights = objective_weights(recipe, config, recipe.items(first_batch(dataset, [0], whole)))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(config.run.mixed_precision, launch))
    with torch.autocast(launch.device.type, kind, enabled=kind is not None):
        result = evaluate(objective, recipe, weights, dataset, batch_size, config.run, launch)
    assert result is not None
    return result
