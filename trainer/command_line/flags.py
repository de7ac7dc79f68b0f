"""Flags of a command line and keys of a YAML file: their spellings, their checks, and tyro's errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from trainer.command_line.secrets import without_urls
from trainer.errors import UserError, one_line

SECTIONS = ("model", "data", "optimisation", "run")
Switch = typing.Literal["auto", "yes", "no"]
"""a flag that is on, `--compile`, off, `--no_compile`, or decided by what the launch is"""
_OF_A_SWITCH = "true, false or auto"


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


NOTHING = object()
"""the value of a key that has none in a YAML file"""


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Plain data only (SafeLoader refuses every !!python tag), and no key twice.

    Of what stands without quotes only true, false, null and << are not text: a field knows best what `010`, `1:30`, `1e-3`
    or `no` is to be, which YAML 1.1 takes for 8, 90, text and false.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(name for (tag, name), count in Counter(keys).items() if count > 1)
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into a mapping: its own keys win, then the first of a list (PyYAML's versions disagree)."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                own[str(key.value)] = (key, value)
                continue
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "<< takes a mapping or a list of them", value.start_mark
                    )
                self.flatten_mapping(base)
                for pair in base.value:
                    merged.setdefault(str(pair[0].value), pair)
        node.value = list({**merged, **own}.values())

    def construct_null(self, node: yaml.ScalarNode) -> object:
        return None if node.value else NOTHING


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:null", _Loader.construct_null)
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
MOST_BYTES = 1_000_000  # of a YAML file: `--config model.safetensors` is a mistake


def _kinds(config_class: Any) -> dict[str, tuple[str, bool]]:
    """What YAML may hold for each field, and whether null too."""
    kinds: dict[str, tuple[str, bool]] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            kinds |= _kinds(hint)
            continue
        inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        may_be_null = type(None) in typing.get_args(hint)
        if may_be_null and len(inner) == 1:
            hint = inner[0]
        kind = "true or false" if hint is bool else "one value"
        if typing.get_origin(hint) is tuple:
            kind = "one value or a list" if typing.get_args(hint)[-1] is ... else "a list"
        kind = _OF_A_SWITCH if hint == Switch else kind
        kinds[name] = (kind, may_be_null)
    return kinds


def _kind(value: Any) -> str:
    """What a value of a YAML file is, in the words of `_kinds`."""
    if isinstance(value, bool | list):
        return "true or false" if isinstance(value, bool) else "a list"
    names = {type(None): "null", dict: "a section"}
    return "one value" if isinstance(value, str | int | float) else names.get(type(value), f"a {type(value).__name__}")


def _load(path: Path, shown: str) -> Any:
    """The content of a YAML file, which messages call `shown`. UserError, with the line where there is one, if it has none."""
    try:
        if path.is_fifo() or path.is_char_device():  # reading it might never end
            raise UserError(f"{shown}: not an ordinary file; give a YAML file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{shown}: more than {MOST_BYTES:,} bytes; give a file of `name: value` lines")
        return yaml.load(content.decode(), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{shown}{line}: {without_urls(problem)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not have; `!!int word`
        raise UserError(f"{shown}: {without_urls(one_line(error))}") from None
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply; give `name: value` lines, flat or in sections") from None


def read_yaml(path: Path, config_class: type) -> dict[str, Any]:
    """{field: value} of a YAML file, flat or in sections. UserError, naming file and key, for whatever cannot be meant.

    A config class may have sections of its own for files: `yaml_sections` {section: {key: field}}, or {section: None} for
    one that takes any field. In such a section a key means that field, whatever it means elsewhere.
    """
    names, kinds = flag_names(config_class), _kinds(config_class)
    own: Mapping[str, Mapping[str, str] | None] = getattr(config_class, "yaml_sections", {})
    sections = {**dict.fromkeys(SECTIONS), **own}
    shown = f"--config {without_urls(str(path))}"
    data = _load(path, shown)
    if not isinstance(data, dict):
        found = "nothing" if data in (None, NOTHING) else _kind(data)
        raise UserError(f"{shown}: expected `name: value` lines, found {found}")
    flat: dict[str, Any] = {}
    for key, value in data.items():
        section = key in sections and (value is None or value is NOTHING or isinstance(value, dict))
        known = (sections[key] if section else None) or names
        where = f" in section {key}" if section else ""
        entries = value if isinstance(value, dict) else {}
        for name, leaf in (entries if section else {key: value}).items():
            canonical = known.get(str(name).replace("-", "_"))
            if canonical is None:
                if key in sections and not section:
                    raise UserError(f"{shown}: {key} is a section; write its values as `name: value` below it")
                near = nearest(str(name), [*known, *(() if section else sections)])
                raise UserError(f"{shown}: unknown key {without_urls(str(name))!r}{where}{near}")
            if canonical in flat:
                raise UserError(f"{shown}: {canonical} is given twice; keep one")
            if isinstance(leaf, dict) and _weighted(leaf) is leaf:
                raise UserError(f"{shown}: {name} takes a value, not a section; sections are {', '.join(sections)}")
            if canonical in ("preset", "config") and leaf is not None:
                raise UserError(f"{shown}: {canonical} cannot be given in a file; type --{canonical}")
            flat[canonical] = _checked(leaf, *kinds[canonical], f"{shown}: {name}")
    return flat


def _weighted(part: Any) -> Any:
    """`{path: PATH, weight: WEIGHT}` as the command line spells it; anything else as it is."""
    return f"{part['path']}={part['weight']}" if isinstance(part, dict) and part.keys() == {"path", "weight"} else part


def _checked(leaf: Any, wanted: str, may_be_null: bool, shown: str) -> Any:
    """A value of a YAML file, of the kind that its field takes; UserError, which begins with `shown`, for any other."""
    if wanted == "one value or a list":
        leaf, wanted = [_weighted(part) for part in (leaf if isinstance(leaf, list) else [leaf])], "a list"
    parts = leaf if isinstance(leaf, list) else [leaf]
    if any(part is NOTHING for part in parts):
        raise UserError(f"{shown} has no value; write one, or remove the line")
    if wanted in ("true or false", _OF_A_SWITCH) and isinstance(leaf, str):
        leaf = _SWITCHES.get(leaf.lower(), leaf)
    if wanted == _OF_A_SWITCH and (leaf == "auto" or isinstance(leaf, bool)):
        return leaf
    if leaf is None and may_be_null:
        return None
    if _kind(leaf) != wanted:
        found = without_urls(repr(leaf)) if isinstance(leaf, str | bool) else _kind(leaf)
        raise UserError(f"{shown} takes {wanted}, found {found[:100]}")
    wrong = next((_kind(part) for part in parts if _kind(part) != "one value"), None)
    if isinstance(leaf, list) and wrong:
        raise UserError(f"{shown} takes a list of single values, found {wrong} in it")
    return leaf


def cli(config_class: type, argv: Sequence[str], prog: str, default: Any) -> Any:
    """tyro.cli, with prefixes of sections left out and its errors as a UserError of one line."""
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
    if safe != list(argv):  # tyro breaks words over lines: let it explain again, with words that may be shown
        cli(config_class, safe, prog, default)
        raise UserError("the command line cannot be read; --help all lists every flag")
    raise UserError(_one_line(printed.getvalue(), config_class))


def switched(argv: Sequence[str], config_class: Any) -> list[str]:
    """A command line with the values of its switches written out: `--compile` as `--compile=yes`."""
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
    """A config class and its sections."""
    sections = typing.get_type_hints(config_class).values()
    return [config_class, *(hint for hint in sections if dataclasses.is_dataclass(hint))]


def _one_line(box: str, config_class: type) -> str:
    """tyro explains in a box; keep its first paragraph, and add the nearest flag if a name was unknown."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    text = " ".join(lines[: rules[0] if rules else None]) or box.strip()
    unknown = re.search(r"Unrecognized options: (--?[\w-]+)", text)
    if unknown:
        word = unknown[1].lstrip("-").replace("-", "_")
        return f"unknown flag {unknown[1]}{nearest(word, flag_names(config_class))}; --help all lists every flag"
    return text.rstrip(".") + "; --help all lists every flag"
