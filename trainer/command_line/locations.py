"""Which flags are paths, written on the field itself: `data_dir: Annotated[str | None, Existing]`."""

from __future__ import annotations

import dataclasses
import glob
import os
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError


@dataclass(frozen=True)
class Location:
    """The value of a flag, or each of several, is a path."""

    to_make: bool = False
    """it need not exist yet; any other that does not is the name of something else (`gpt2`, of the hub)"""
    weighted: bool = False
    """behind it may stand `=WEIGHT`"""
    words: tuple[str, ...] = ()
    """what means something else, even where a file or folder is called so: that is ./WORD"""


Existing = Location()
ToMake = Location(to_make=True)
Weighted = Location(weighted=True, words=("embedded",))
Tokenizer = Location(words=("gpt2", "train"))


def path_and_weight(text: str) -> tuple[str, float | None]:
    """The parts of `PATH=WEIGHT`; no weight for the path of what is there, such as the folder `year=2024`."""
    path, _, weight = text.rpartition("=")
    if path and not os.path.exists(os.path.expanduser(text)):
        with suppress(ValueError):
            return path, float(weight)
    return text, None


def argument_path(text: str) -> Path:
    """A path of the command line of a tool: no shell replaces the `~` of `--out=~/data`."""
    return Path(text).expanduser()


def with_homes(config: Any) -> Any:
    """`config` with `~` replaced in every path: no shell does it in a YAML file, nor behind `=`."""
    return _changed(config, lambda path, location: os.path.expanduser(path))


def with_absolute_paths(config: Any) -> Any:
    """`config` for any working directory: paths, and patterns that match any, made absolute."""

    def absolute(path: str, location: Location) -> str:
        is_path = location.to_make or (path not in location.words and (os.path.exists(path) or glob.glob(path, recursive=True)))
        return os.path.abspath(path) if is_path else path

    return _changed(config, absolute)


def locations(section: type) -> dict[str, Location]:
    """The fields of a dataclass that are paths."""
    hints = typing.get_type_hints(section, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, several in marks.items() for mark in several if isinstance(mark, Location)}


def _changed(config: Any, change: Callable[[str, Location], str]) -> Any:
    """`config`, a flat dataclass or one of sections, with `change` applied to every path that is given."""

    def changed(name: str, text: str, location: Location) -> str:
        if not text:
            raise UserError(f"{name} is empty, perhaps a variable that is not set; give a path, or leave it out")
        path = path_and_weight(text)[0] if location.weighted else text
        return change(path, location) + text.removeprefix(path)

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: _changed(value, change) for name, value in values.items() if dataclasses.is_dataclass(value)}
    paths: dict[str, Any] = {}
    for name, location in locations(type(config)).items():
        if isinstance(values[name], tuple):
            paths[name] = tuple(changed(name, text, location) for text in values[name])
        elif values[name] is not None:
            paths[name] = changed(name, values[name], location)
    return dataclasses.replace(config, **sections, **paths)
