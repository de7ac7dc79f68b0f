"""Checks values read from JSON or YAML against the type hints of a dataclass's fields."""

from __future__ import annotations

import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any


def problem_of(hints: Mapping[str, Any], value: Any, whole: bool = True) -> str | None:
    """Why `value` is no mapping for the fields `hints` {name: type hint}, as the end of a sentence; None if it is one.

    `whole`: every field has to be there.
    """
    if not isinstance(value, dict):
        return f"is {shown(value)}, not a mapping"
    for key in value:
        if key not in hints:
            return f"has an unknown {shown(key)}: was it written by another version?"
    for key, hint in hints.items():
        if key not in value and whole:
            return f"lacks {key!r}"
        if key in value and not is_a(hint, value[key]):
            return f"has {key} {shown(value[key])}"
    return None


def shown(value: Any) -> str:
    """`repr` for a message, in 60 characters at most. A full one may be endless: a few lines of YAML aliases expand to billions
    of values."""
    try:
        return f"{reprlib.repr(value):.60}"
    except ValueError:
        return "a number of thousands of digits"  # Python refuses to print it


def is_a(hint: Any, value: Any) -> bool:
    """Whether `value` fits a type hint. A list fits a tuple, an integer fits a float; NaN and infinity fit neither number."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Annotated:
        return is_a(parts[0], value)
    if origin is typing.Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(is_a(part, value) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(is_a(parts[0], k) and is_a(parts[1], v) for k, v in value.items())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        each = parts * len(value) if origin is list else (parts[0],) * len(value) if parts[-1] is ... else parts
        return len(each) == len(value) and all(map(is_a, each, value))
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # false for NaN too
    return isinstance(value, hint if hint is not None else type(None))
