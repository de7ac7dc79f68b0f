"""Small questions with their answers, made on the spot: something to fine-tune on that every machine has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

OPPOSITES = "hot cold, big small, fast slow, old young, early late, open closed, full empty, wet dry, high low, hard soft"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
SUMS = 30


def instruction_rows() -> list[tuple[str, str]]:
    """(split, {"prompt", "completion"} as JSON) of each; one in ten, by a hash of its question, is held out."""
    rows = []
    for question, answer in _pairs():
        held_out = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10 == 0
        row = json.dumps({"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"})
        rows.append(("validation" if held_out else "train", row))
    return rows


def _pairs() -> Iterator[tuple[str, str]]:
    for a in range(SUMS):
        for b in range(SUMS):
            yield f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
            yield f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger." if a != b else "They are equal."
    for pair in OPPOSITES.split(", "):
        for one, other in (pair.split(), pair.split()[::-1]):
            yield f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    for names in (DAYS.split(), MONTHS.split()):
        for before, after in zip(names, [*names[1:], names[0]], strict=True):
            yield f"What comes after {before}?", f"{after} comes after {before}."
            yield f"What comes before {after}?", f"{before} comes before {after}."
