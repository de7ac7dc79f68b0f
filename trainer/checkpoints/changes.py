"""What a resumed run may change of its configuration.

A flag that was not typed takes the checkpoint's value. One that was typed and differs is a change: allowed in `run`, in
`optimisation` with `--resume_from`, and refused in `model` and `data`, for the seed and for the effective batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from trainer.checkpoints.checkpoint import CONFIG, Checkpoint
from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.command_line.locations import locations, with_absolute_paths
from trainer.command_line.sections import PER_LAUNCH, Run
from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Recipe


def config_of(recipe: Recipe, saved: Checkpoint) -> Any:
    """The configuration of a checkpoint of this recipe. UserError (exit 5) if it is damaged."""
    source = str(saved.path / CONFIG)
    try:
        config = configuration.from_mapping(recipe.config_class, saved.config, source)
        configuration.check(config)
    except UserError as error:
        where = "" if source in str(error) else f"{source}: "
        raise UserError(f"{where}{error}; choose another checkpoint", CHECKPOINT) from None
    return config


def merge(
    recipe: Recipe, parsed: Parsed, argv: Sequence[str], saved: Checkpoint, same_run: bool, log: Callable[[str], None]
) -> Any:
    """The checkpoint's configuration with the changes that were typed. UserError for one that is not allowed."""
    written_by = saved.state["recipe"]
    if written_by != recipe.name:
        raise UserError(f"{saved.path} was written by recipe {written_by!r}, not {recipe.name!r}; choose another checkpoint")
    original = config_of(recipe, saved)
    typed = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name, default=original).config
    config = with_absolute_paths(typed)
    if config.run.fit_batch and parsed.config.optimisation.effective_batch_size == original.optimisation.effective_batch_size:
        split = {name: getattr(original.optimisation, name) for name in ("batch_size", "gradient_accumulation_steps")}
        config = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, **split))
    own = {name: getattr(parsed.config.run, name) for name in PER_LAUNCH}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **own))

    if original.run.mixed_precision != config.run.mixed_precision:
        log(f"mixed_precision: {original.run.mixed_precision} -> {config.run.mixed_precision}")
    way_out = f"train it under another --run_name, or take the weights only: --init_from {saved.path}"
    _check_model_and_data(original, config, parsed.config.run, saved, way_out, log)
    _check_optimisation(original, config, saved, same_run and not parsed.config.run.resume_from, way_out, log)
    return config


def _check_model_and_data(
    original: Any, config: Any, run: Run, saved: Checkpoint, way_out: str, log: Callable[[str], None]
) -> None:
    """UserError for changes of `model` or `data`; those that are accepted are logged.

    Accepted are paths, as the fingerprint tells whether the data there are the same, and with `--data_changed accept` all of
    `data`.
    """
    changes = configuration.changed(config, original, ("model", "data"))
    accepted = (
        configuration.changed(config, original, ("data",)) if run.data_changed == "accept" else locations(type(config.data))
    )
    for name in accepted:
        if name in changes:
            before, after = changes.pop(name)
            log(f"{name}: {configuration.spelled(before)} -> {configuration.spelled(after)}")
    if changes:
        each = "; ".join(f"{name}: {saved.path.name} has {old}, asked for {new}" for name, (old, new) in changes.items())
        raise UserError(f"{each}; {way_out}")


def _check_optimisation(
    original: Any, config: Any, saved: Checkpoint, continues: bool, way_out: str, log: Callable[[str], None]
) -> None:
    """UserError for changes of `optimisation` that would make another run; the others are logged.

    `continues`: the run simply goes on, without `--resume_from`, and then only the split of the effective batch may change.
    """
    old, new = original.optimisation, config.optimisation
    switched = bool(old.ema) != bool(new.ema)  # a checkpoint has averages, or has none; their decay may change
    for name in ("seed", "init_from", *(["ema"] if switched else [])):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise UserError(f"{name}: {saved.path} has {before}, asked for {after}; {way_out}")
    if old.effective_batch_size != new.effective_batch_size:
        before, after = (f"{o.batch_size} x {o.gradient_accumulation_steps} = {o.effective_batch_size}" for o in (old, new))
        raise UserError(f"effective batch: {saved.path} has {before}, asked for {after}; keep the product, or {way_out}")
    for name, (before, after) in configuration.changed(config, original, ("optimisation",)).items():
        if name in ("batch_size", "gradient_accumulation_steps"):
            continue  # the same effective batch, split otherwise
        if name == "max_epochs" and old.max_steps and new.max_steps:
            continue  # max_steps decides; max_epochs may come from a preset, which checkpoints do not name
        if continues:
            raise UserError(
                f"{name}: the run has {before}, asked for {after}; to change it in mid-run add --resume_from {saved.path}, "
                "or start another with --run_name"
            )
        log(f"{name}: {before} -> {after}")
