"""Flags of a command line: how they are spelled, and tyro, which reads them, with its errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from trainer.command_line.secrets import without_urls
from trainer.errors import UserError

Switch = typing.Literal["auto", "yes", "no"]
"""the type of a flag that is on (`--compile`), off (`--no_compile`), or left to the launch (auto)"""


def flag_names(config_class: Any) -> dict[str, str]:
    """{spelling: field} of every flag and alias; spellings have underscores, and no dashes in front."""
    names: dict[str, str] = {}
    for name, hint in typing.get_type_hints(config_class, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            names |= flag_names(hint)
            continue
        names[name] = name
        for extra in getattr(hint, "__metadata__", ()):
            names |= {alias.lstrip("-").replace("-", "_"): name for alias in getattr(extra, "aliases", None) or ()}
    return names


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` with the word of `known` that is most like `word`; empty if none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of the last `--name X` or `--name=X`, without parsing the rest; None if there is none."""
    value = None
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def typed(argv: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """Those keys of `names` (spellings, see `flag_names`) that a command line gives, also as `--no_...`."""
    words = {w.partition("=")[0].lstrip("-").replace("-", "_") for w in argv if w.startswith("--")}
    return {w for word in words for w in (word, word.removeprefix("no_")) if w in names}


def arguments(mapping: Mapping[str, Any]) -> list[str]:
    """{name: value} as words of a command line, so that a preset or a file passes the checks that typed flags pass."""
    words: list[str] = []
    for name, value in mapping.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


def cli(config_class: type, argv: Sequence[str], prog: str, default: Any) -> Any:
    """An instance of `config_class` from a command line, by tyro. Flags that are not given have their values in `default`, or
    in the class if it is None. UserError, in one line, for what tyro refuses."""
    printed = io.StringIO()
    marker = tyro.conf.OmitArgPrefixes[config_class]  # type: ignore[valid-type]
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            words = switched(argv, config_class)
            return tyro.cli(marker, args=words, prog=prog, use_underscores=True, **extra)
    except SystemExit as end:
        if not end.code:
            raise
    safe = [without_urls(word) for word in argv]
    if safe != list(argv):  # tyro wraps its message inside words, where no URL can be found: let it explain the safe words
        cli(config_class, safe, prog, default)
        raise UserError("the command line cannot be read; --help all lists every flag")
    raise UserError(_one_line(printed.getvalue(), config_class))


def switched(argv: Sequence[str], config_class: Any) -> list[str]:
    """A command line with each Switch written out: `--compile` as `--compile=yes`. UserError for a bool with a value."""
    hints = {name: hint for part in _parts(config_class) for name, hint in typing.get_type_hints(part).items()}
    words = list(argv)
    for i, word in enumerate(words):
        name, following = word.removeprefix("--").replace("-", "_"), words[i + 1 : i + 2] or ["--"]
        if (
            word.startswith("--")
            and hints.get(name) is bool
            and following[0].lower() in ("true", "false", "yes", "no", "0", "1")
        ):
            raise UserError(f"{word} takes no value: give --{name} or --no_{name}")
        if word.startswith("--") and hints.get(name.removeprefix("no_")) == Switch and following[0].startswith("--"):
            words[i] = f"--{name.removeprefix('no_')}={'no' if name.startswith('no_') else 'yes'}"
    return words


def _parts(config_class: Any) -> list[Any]:
    """A config class and the classes of its sections."""
    sections = typing.get_type_hints(config_class).values()
    return [config_class, *(hint for hint in sections if dataclasses.is_dataclass(hint))]


def _one_line(box: str, config_class: type) -> str:
    """The first paragraph of the box that tyro prints; for an unknown flag, a line with the nearest one instead."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    text = " ".join(lines[: rules[0] if rules else None]) or box.strip()
    unknown = re.search(r"Unrecognized options: (--?[\w-]+)", text)
    if unknown:
        word = unknown[1].lstrip("-").replace("-", "_")
        return f"unknown flag {unknown[1]}{nearest(word, flag_names(config_class))}; --help all lists every flag"
    return text.rstrip(".") + "; --help all lists every flag"
