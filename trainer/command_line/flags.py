"""Flags of a command line and keys of a YAML file: their spellings, their checks, and tyro's errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from trainer.command_line.secrets import without_urls
from trainer.errors import UserError

SECTIONS = ("model", "data", "optimisation", "run")


def flag_names(config_class: Any) -> dict[str, str]:
    """Every spelling of every flag, with underscores and without dashes -> the field it sets."""
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
    """A question with the likeliest of `known`, in brackets; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def peek(argv: Sequence[str], name: str) -> str | None:
    """The last value of `--name X` or `--name=X`, before the real parser runs."""
    value = None
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def typed(argv: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """The spellings of `names` that occur in a command line."""
    words = {w.partition("=")[0].lstrip("-").replace("-", "_") for w in argv if w.startswith("--")}
    return {w for word in words for w in (word, word.removeprefix("no_")) if w in names}


def arguments(mapping: Mapping[str, Any]) -> list[str]:
    """{name: value} as command-line words, so that a preset or a file meets the checks a typed flag meets."""
    words: list[str] = []
    for name, value in mapping.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


class _UniqueKeys(yaml.SafeLoader):
    """Plain data only (SafeLoader refuses every !!python tag), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _kinds(config_class: Any) -> dict[str, str]:
    """What YAML may hold for each field."""
    kinds: dict[str, str] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            kinds |= _kinds(hint)
            continue
        inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if type(None) in typing.get_args(hint) and len(inner) == 1:
            hint = inner[0]
        kinds[name] = "true or false" if hint is bool else "a list" if typing.get_origin(hint) is tuple else "one value"
    return kinds


def read_yaml(path: Path, config_class: type) -> dict[str, Any]:
    """{field: value} of a YAML file, flat or in sections. UserError, naming file and key, for whatever cannot be meant.

    A config class may have sections of its own for files: `yaml_sections` {section: {key: field}}, or {section: None} for
    one that takes any field. In such a section a key means that field, whatever it means elsewhere.
    """
    names, kinds = flag_names(config_class), _kinds(config_class)
    own: Mapping[str, Mapping[str, str] | None] = getattr(config_class, "yaml_sections", {})
    sections = {**dict.fromkeys(SECTIONS), **own}
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(f"--config {path}: expected `name: value` lines, found {type(data).__name__}")
    flat: dict[str, Any] = {}
    for key, value in data.items():
        section = key in sections and (value is None or isinstance(value, dict))
        known = (sections[key] if section else None) or names
        where = f" in section {key}" if section else ""
        for name, leaf in ((value or {}) if section else {key: value}).items():
            canonical = known.get(str(name).replace("-", "_"))
            if canonical is None:
                near = nearest(str(name), [*known, *(() if section else sections)])
                raise UserError(f"--config {path}: unknown key {without_urls(str(name))!r}{where}{near}")
            if canonical in flat:
                raise UserError(f"--config {path}: {canonical} is given twice; keep one")
            if isinstance(leaf, dict):
                raise UserError(f"--config {path}: {name} takes a value, not a section; sections are {', '.join(sections)}")
            if canonical in ("preset", "config") and leaf is not None:
                raise UserError(f"--config {path}: {canonical} cannot be given in a file; type --{canonical} {leaf}")
            kind = "true or false" if isinstance(leaf, bool) else "a list" if isinstance(leaf, list) else "one value"
            if leaf is not None and kind != kinds[canonical]:
                raise UserError(f"--config {path}: {name} takes {kinds[canonical]}, found {without_urls(repr(leaf))}")
            flat[canonical] = leaf
    return flat


def cli(config_class: type, argv: Sequence[str], prog: str, default: Any, description: str) -> Any:
    """tyro.cli, with prefixes of sections left out and its errors as a UserError of one line."""
    printed = io.StringIO()
    marker = tyro.conf.OmitArgPrefixes[config_class]  # type: ignore[valid-type]
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(marker, args=list(argv), prog=prog, description=description, use_underscores=True, **extra)
    except SystemExit as end:
        if not end.code:
            raise
    safe = [without_urls(word) for word in argv]
    if safe != list(argv):  # tyro breaks words over lines: let it explain again, with words that may be shown
        cli(config_class, safe, prog, default, description)
        raise UserError("the command line cannot be read; --help lists all flags")
    raise UserError(_one_line(printed.getvalue(), config_class))


def _one_line(box: str, config_class: type) -> str:
    """tyro explains in a box; keep its first paragraph, and add the nearest flag if a name was unknown."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    text = " ".join(lines[: rules[0] if rules else None]) or box.strip()
    unknown = re.search(r"Unrecognized options: (--?[\w-]+)", text)
    if unknown:
        word = unknown[1].lstrip("-").replace("-", "_")
        return f"unknown flag {unknown[1]}{nearest(word, flag_names(config_class))}; --help lists all flags"
    return text.rstrip(".") + "; --help lists all flags"
