"""The flags that `--init_from` sets: the shape of the network whose weights it names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import CONFIG, ENDINGS, MANIFEST, STATE, Checkpoint, refuse_run_directory
from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.command_line.sections import SECTIONS
from trainer.errors import UserError, one_line
from trainer.recipe import Recipe


def own_checkpoint(init_from: str) -> Path | None:
    """The folder, if it is a checkpoint of this package (even one whose manifest is lost, which must not pass for another
    format); else None."""
    folder = Path(re.sub(ENDINGS, "", init_from))
    refuse_run_directory(folder)
    return folder if any((folder / file).exists() for file in (MANIFEST, STATE)) else None


def settings_of(recipe: Recipe, init_from: str) -> Mapping[str, Any]:
    """{flag: its value} of the network whose weights `--init_from` names. UserError if the recipe cannot build it."""
    folder, config = own_checkpoint(init_from), None
    if folder is not None:
        saved = Checkpoint(folder)
        if saved.state["recipe"] == recipe.name:
            config = configuration.from_mapping(recipe.config_class, saved.config, str(folder / CONFIG))
    try:
        return recipe.pretrained_settings(str(folder or init_from), config)
    except (ValueError, OSError) as error:
        raise UserError(f"--init_from {init_from}: {one_line(error)}") from error


def with_settings(recipe: Recipe, parsed: Parsed, argv: Sequence[str]) -> Parsed:
    """`parsed`, which comes from `argv`, with flags that were not typed taken from the network that `--init_from` names.

    UserError for a typed flag that differs from it.
    """
    init_from = parsed.config.optimisation.init_from
    if init_from is None:
        return parsed
    settings = settings_of(recipe, init_from)
    defaults, sections = recipe.config_class(), {}
    for name in SECTIONS:
        section = getattr(defaults, name)
        own = {field.name: settings[field.name] for field in dataclasses.fields(section) if field.name in settings}
        sections[name] = dataclasses.replace(section, **own)
    taken = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name, default=recipe.config_class(**sections))
    asked = configuration.values(taken.unresolved)
    wrong = [name for name in settings if asked[name] != settings[name] and name not in recipe.free_settings]
    if wrong:
        each = "; ".join(f"{name}: {init_from} has {settings[name]}, asked for {asked[name]}" for name in wrong)
        raise UserError(f"{each}; leave out what its weights do not fit, or {recipe.other_weights}")
    return dataclasses.replace(parsed, config=taken.config)
