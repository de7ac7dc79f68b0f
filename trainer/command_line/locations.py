"""Which flags are paths, annotated on the field: `data_dir: Annotated[str | None, Existing]`."""

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
    """Marks a field whose value, or each of whose values, is a path."""

    to_make: bool = False
    """the path need not exist yet. Without this mark, a value that does not exist names something else (`gpt2` on the hub)"""
    weighted: bool = False
    """the path may be followed by `=WEIGHT`"""
    words: tuple[str, ...] = ()
    """values that are no paths, even where a file or folder has that name: it is written ./WORD"""


Existing = Location()
ToMake = Location(to_make=True)
Weighted = Location(weighted=True, words=("embedded",))
Tokenizer = Location(words=("gpt2", "train"))


def path_and_weight(text: str) -> tuple[str, float | None]:
    """(path, weight) of `PATH=WEIGHT`. The weight is None if there is none, or if `text` as a whole exists (`year=2024`)."""
    path, _, weight = text.rpartition("=")
    if path and not os.path.exists(os.path.expanduser(text)):
        with suppress(ValueError):
            return path, float(weight)
    return text, None


def argument_path(text: str) -> Path:
    """A path from a tool's command line, with `~` expanded: no shell does that in `--out=~/data`."""
    return Path(text).expanduser()


def with_homes(config: Any) -> Any:
    """`config` with `~` expanded in every path: no shell does that in a YAML file, or after `=`."""
    return _changed(config, lambda path, location: os.path.expanduser(path))


def with_absolute_paths(config: Any) -> Any:
    """`config` with its paths, and glob patterns that match some file, made absolute, so that it holds in any directory."""

    def absolute(path: str, location: Location) -> str:
        is_path = location.to_make or (path not in location.words and (os.path.exists(path) or glob.glob(path, recursive=True)))
        return os.path.abspath(path) if is_path else path

    return _changed(config, absolute)


def locations(section: type) -> dict[str, Location]:
    """{field: its mark} of the fields of a dataclass that are paths."""
    hints = typing.get_type_hints(section, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, several in marks.items() for mark in several if isinstance(mark, Location)}


def _changed(config: Any, change: Callable[[str, Location], str]) -> Any:
    """`config` (flat or in sections) with each path replaced by `change(path, its mark)`. UserError for an empty path."""

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
