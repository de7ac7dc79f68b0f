"""Reads a YAML file of flags, flat or in sections. An error names the file, and the line or key."""

import re
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.command_line.flags import Switch, flag_names, nearest
from trainer.command_line.secrets import without_urls
from trainer.command_line.sections import SECTIONS
from trainer.errors import UserError, one_line

NOTHING = object()
"""the value of a key without a value (`seed:`), which YAML takes for null"""
MOST_BYTES = 1_000_000
"""a larger file is a mistake, such as `--config model.safetensors`"""
_OF_A_SWITCH = "true, false or auto"
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads plain data only (SafeLoader refuses every !!python tag), and refuses a key that is given twice.

    Without quotes only true, false, null and << are more than text. YAML 1.1 reads `010` as 8, `1:30` as 90, `1e-3` as text and
    `no` as false; here the type of the field decides.
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
        """Merge the mappings that `<<` names into `node`. Its own keys win, then the first mapping of a list: PyYAML's versions
        disagree about that."""
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


def _kinds(config_class: Any) -> dict[str, tuple[str, bool]]:
    """{field: (the kind of value that a file may give it, in words; whether it may be null)}."""
    kinds: dict[str, tuple[str, bool]] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if is_dataclass(hint):
            kinds |= _kinds(hint)
            continue
        inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        may_be_null = type(None) in typing.get_args(hint)
        if may_be_null and len(inner) == 1:
            hint = inner[0]
        if hint == Switch:
            kind = _OF_A_SWITCH
        elif typing.get_origin(hint) is tuple:
            kind = "one value or a list" if typing.get_args(hint)[-1] is ... else "a list"
        else:
            kind = "true or false" if hint is bool else "one value"
        kinds[name] = (kind, may_be_null)
    return kinds


def _kind(value: Any) -> str:
    """The kind of a value from a YAML file, in the words of `_kinds`."""
    if isinstance(value, bool | list):
        return "true or false" if isinstance(value, bool) else "a list"
    names = {type(None): "null", dict: "a section"}
    return "one value" if isinstance(value, str | int | float) else names.get(type(value), f"a {type(value).__name__}")


def _load(path: Path, shown: str) -> Any:
    """The content of a YAML file. UserError, which begins with `shown` and names the line if it can, if it cannot be read."""
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
    """{field: value} of a YAML file, flat or in sections. UserError, which names file and key, for an unknown key or a value of
    the wrong kind.

    `config_class.yaml_sections`, if it exists, adds sections for files: {section: {key: field}}, where a key means that field
    whatever it means elsewhere, or {section: None} for a section that takes any field.
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
        is_section = key in sections and (value is None or value is NOTHING or isinstance(value, dict))
        known = (sections[key] if is_section else None) or names
        where = f" in section {key}" if is_section else ""
        entries = value if isinstance(value, dict) else {}
        for name, leaf in (entries if is_section else {key: value}).items():
            field = known.get(str(name).replace("-", "_"))
            if field is None:
                if key in sections and not is_section:
                    raise UserError(f"{shown}: {key} is a section; write its values as `name: value` below it")
                near = nearest(str(name), [*known, *(() if is_section else sections)])
                raise UserError(f"{shown}: unknown key {without_urls(str(name))!r}{where}{near}")
            if field in flat:
                raise UserError(f"{shown}: {field} is given twice; keep one")
            if isinstance(leaf, dict) and _weighted(leaf) is leaf:
                raise UserError(f"{shown}: {name} takes a value, not a section; sections are {', '.join(sections)}")
            if field in ("preset", "config") and leaf is not None:
                raise UserError(f"{shown}: {field} cannot be given in a file; type --{field}")
            flat[field] = _checked(leaf, *kinds[field], f"{shown}: {name}")
    return flat


def _weighted(part: Any) -> Any:
    """`{path: PATH, weight: WEIGHT}` as the flag's `PATH=WEIGHT`; anything else unchanged."""
    return f"{part['path']}={part['weight']}" if isinstance(part, dict) and part.keys() == {"path", "weight"} else part


def _checked(leaf: Any, wanted: str, may_be_null: bool, shown: str) -> Any:
    """`leaf` as `arguments` takes it, if it is of the kind `wanted`. UserError, which begins with `shown`, for any other."""
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
