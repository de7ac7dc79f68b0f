"""The results of the pieces: figures, the JSON file that they are written to one by one, and the printed table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TITLES = {
    "a": "GPT-2 124M, beside a bare loop, nanoGPT's arrangement and HF Trainer",
    "b": "overhead of the loop, and waits of the host for the device",
    "c": "TinyStories, the default model",
    "d": "PFN: 16 models stacked, and in turn",
    "e": "ViT-B: relative position bias beside plain",
    "f": "Collatz: steps and waiting for data",
    "g": "how long a save holds up the loop",
    "h": "one GPU under each launch and precision: losses side by side",
    "i": "exact resume with --deterministic",
    "j": "the kernels that take the time of a GPT-2 step",
}
"""the pieces, most important first"""


@dataclass
class Figure:
    """A line of the table."""

    name: str
    value: float
    unit: str
    goal: str = ""


@dataclass
class Result:
    """The result of one piece."""

    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """JSON values that do not fit the table: curves, spreads, kernels"""
    notes: list[str] = field(default_factory=list)
    """lines on what could not be measured, and why"""
    error: str = ""

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        """Add a figure."""
        self.figures.append(Figure(name, value, unit, goal))


class ResultFile:
    """A JSON file of results by piece; one process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """{piece: its result}; empty if there is no file yet."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def write(self, piece: str, result: Result, **facts: Any) -> None:
        """Add or replace the result of a piece."""
        everything = self.read() | {piece: {"title": TITLES[piece], **facts, **asdict(result)}}
        self._replace({letter: everything[letter] for letter in TITLES if letter in everything})

    def drop(self, piece: str) -> None:
        """Remove the result of a piece, so that it is measured again."""
        self._replace({letter: result for letter, result in self.read().items() if letter != piece})

    def _replace(self, results: dict[str, dict[str, Any]]) -> None:
        """Write the file atomically."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def figure(self, piece: str, name: str) -> float | None:
        """The value of a figure that an earlier piece has measured; None without it."""
        figures = self.read().get(piece, {}).get("figures", [])
        return next((figure["value"] for figure in figures if figure["name"] == name), None)


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of the table of all results."""
    for piece, result in results.items():
        where = f"{result.get('device', 'no device')}, {result.get('seconds', 0.0):.0f} s"
        yield f"({piece}) {result['title']} [{where}]"
        for figure in result["figures"]:
            goal = f"  goal {figure['goal']}" if figure["goal"] else ""
            yield f"    {figure['name']:52} {number(figure['value']):>12} {figure['unit']}{goal}"
        for note in result["notes"]:
            yield f"    - {note}"
        if result["error"]:
            yield f"    FAILED: {result['error'].strip().splitlines()[-1]}"


def number(value: float) -> str:
    """Four significant digits; from 1000 on all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@contextmanager
def noting(result: Result, what: str) -> Iterator[None]:
    """Turn an error inside into a note, so that the piece goes on."""
    try:
        yield
    except Exception as error:
        result.notes.append(f"{what}: {reason(error)}")


def reason(error: BaseException) -> str:
    """An error in one line; for a missing package its name."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name}, which is not installed"
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
