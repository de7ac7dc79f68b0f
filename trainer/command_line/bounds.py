"""Ranges of numbers, annotated on a field (`d_model: Annotated[int, Positive]`) and checked by `config.check`."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """A range. It holds for a number, and for each number of a tuple; None, where a field may be None, is always allowed."""

    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf
    exclusive: bool = False
    """whether `least` itself is outside the range"""

    def broken_by(self, value: float) -> str | None:
        """What `value` has to be (`must be at least 1`) if it is outside the range; None if it is inside."""
        if (self.least < value or (value == self.least and not self.exclusive)) and value < self.below and value <= self.most:
            return None
        if self.below == self.most == math.inf and self.least == 0 and not self.exclusive:
            return "must not be negative"
        wanted = f"must be {'above' if self.exclusive else 'at least'} {self.least:g}"
        if self.below < math.inf:
            return f"{wanted} and below {self.below:g}"
        return f"{wanted} and at most {self.most:g}" if self.most < math.inf else wanted


Positive = Bound(0, exclusive=True)
NotNegative = Bound(0)
Fraction = Bound(0, below=1)


def AtLeast(least: float) -> Bound:  # noqa: N802 - reads like the bounds above
    """The range from `least` on, `least` included."""
    return Bound(least)


def bounded_fields(config: Any) -> Iterator[tuple[str, Any, Bound | None]]:
    """(name, value, bound or None) of every field of a flat dataclass, or of a dataclass of sections."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from bounded_fields(value)
        else:
            marks = getattr(hints[field.name], "__metadata__", ())
            yield field.name, value, next((mark for mark in marks if isinstance(mark, Bound)), None)
