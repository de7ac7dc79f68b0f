"""The settings and results of a search, as JSON: the state to resume from and the report are the same file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from loops.exact import Cycle, Map
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.run_directory import write_text_atomic

VERIFIED_BITS = 71  # all numbers below 2^71 reach 1: D. Barina, J. Supercomputing 81 (2025), doi 10.1007/s11227-025-07337-0
LISTED = 1000  # a report lists so many unresolved numbers, and counts all


@dataclass(frozen=True)
class SearchConfig:
    """A map, the numbers start <= n < start + count to cover, and the limits within which each is followed."""

    rule: Map
    start: int
    count: int
    max_steps: int
    max_bits: int

    @property
    def stop(self) -> int:
        """The first number after the range."""
        return self.start + self.count

    @property
    def rests_on_verified(self) -> bool:
        """Whether all positive numbers below the range are known to reach 1, so that a number is decided once it falls."""
        return self.rule.is_collatz and self.start <= 1 << VERIFIED_BITS

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; start and count as text, because few readers of JSON keep integers of 71 bits."""
        limits = {"max_steps": self.max_steps, "max_bits": self.max_bits}
        return {"map": str(self.rule), "start": str(self.start), "count": str(self.count), **limits}


@dataclass
class Tally:
    """Counts for a stretch of numbers: covered = by_sieve + by_predecessor + followed, each number once.

    redone_exactly: those that were followed in Python's integers, because they do not fit, or have outgrown, 128 bits.
    """

    covered: int = 0
    by_sieve: int = 0
    by_predecessor: int = 0
    followed: int = 0
    redone_exactly: int = 0
    reached: Counter[Cycle] = field(default_factory=Counter)
    unresolved: Counter[str] = field(default_factory=Counter)  # by the limit that was reached
    unresolved_numbers: list[int] = field(default_factory=list)  # the first LISTED

    def give_up(self, n: int, limit: str) -> None:
        """Count `n` as unresolved."""
        self.unresolved[limit] += 1
        if len(self.unresolved_numbers) < LISTED:
            self.unresolved_numbers.append(n)

    def add(self, other: Tally) -> None:
        """Add the counts of the next stretch."""
        self.covered += other.covered
        self.by_sieve += other.by_sieve
        self.by_predecessor += other.by_predecessor
        self.followed += other.followed
        self.redone_exactly += other.redone_exactly
        self.reached.update(other.reached)
        self.unresolved.update(other.unresolved)
        self.unresolved_numbers += other.unresolved_numbers[: LISTED - len(self.unresolved_numbers)]


@dataclass
class Record:
    """The results of a search so far; `seconds`: over all launches."""

    config: SearchConfig
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0

    @property
    def next(self) -> int:
        """The cursor: the first number that is not covered yet."""
        return self.config.start + self.tally.covered

    @property
    def complete(self) -> bool:
        """Whether the whole range is covered."""
        return self.tally.covered == self.config.count

    def conclusion(self) -> str:
        """What the search has shown, and under which assumptions, in words."""
        config, tally = self.config, self.tally
        numbers = "every number of the range" if self.complete else f"every number from {config.start} to {self.next - 1}"
        unresolved = tally.unresolved.total()
        unless = f", except for {unresolved:,} unresolved (a limit was reached)" if unresolved else ""
        if not tally.covered:
            return "nothing is covered yet"
        if not config.rule.is_collatz or self.next <= 1:
            return f"{numbers} was followed into a cycle{unless}"
        if any(cycle.smallest > 0 and not cycle.trivial for cycle in tally.reached):
            return "3n+1 has another cycle of positive numbers: see `cycles`"
        if not config.rests_on_verified:
            open_condition = (
                f"whether it reaches 1 rests on the numbers from 2^{VERIFIED_BITS} up to the start, which are not looked at"
            )
            return f"{numbers} falls below itself, so none is the smallest of a cycle{unless}; {open_condition}"
        if unresolved:
            unless = f", if the {unresolved:,} unresolved (a limit was reached) do"
        if config.start < 1:
            return f"{numbers} was followed into a cycle, or is positive and reaches 1{unless}"
        if config.start == 1:
            return f"{numbers} reaches 1{unless}"
        return f"{numbers} reaches 1{unless}, as all below the start do (verified below 2^{VERIFIED_BITS}: Barina 2025)"

    def to_json(self) -> dict[str, Any]:
        """The contents of the file that is both state and report."""
        tally = self.tally
        counts = {name: getattr(tally, name) for name in _COUNTS}
        cycles = sorted(tally.reached.items(), key=lambda item: (abs(item[0].smallest), -item[0].smallest))
        return {
            **self.config.to_json(),
            "complete": self.complete,
            "conclusion": self.conclusion(),
            "next": str(self.next),
            **counts,
            "cycles": [{**asdict(c), "smallest": str(c.smallest), "reached_by": reached} for c, reached in cycles],
            "unresolved": dict(tally.unresolved),
            "unresolved_numbers": [str(n) for n in tally.unresolved_numbers],
            "seconds": round(self.seconds, 3),
        }

    def write(self, path: Path) -> None:
        """Write `path` atomically. UserError (exit 5) if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps(self.to_json(), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; mend that, or choose another file", CHECKPOINT) from None

    @classmethod
    def read(cls, path: Path, config: SearchConfig) -> Self:
        """The record in `path`, or a new one if there is no such file. UserError if it is damaged or of another search."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(config)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the state {path} ({error}); move it away to begin anew", CHECKPOINT) from None
        if not isinstance(saved, dict):
            raise UserError(f"{path} is no state of a loop search; choose another --state", CHECKPOINT)
        for name, expected in config.to_json().items():
            if saved.get(name) != expected:
                raise UserError(
                    f"{path} is of another search: {name} {saved.get(name)}, not {expected}; choose another --state"
                )
        try:
            record = cls(config, _tally(saved), float(saved["seconds"]))
            parts = record.tally.by_sieve + record.tally.by_predecessor + record.tally.followed
            if record.next != int(saved["next"]) or record.next > config.stop or record.tally.covered != parts:
                raise ValueError("its counts disagree")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the state {path} is damaged ({error}); move it away to begin anew", CHECKPOINT) from None
        return record


_COUNTS = ("covered", "by_sieve", "by_predecessor", "followed", "redone_exactly")


def _tally(saved: Mapping[str, Any]) -> Tally:
    """The tally in the contents of a state file."""
    reached: Counter[Cycle] = Counter()
    for row in saved["cycles"]:
        reached[Cycle(int(row["smallest"]), row["length"], row["odd_steps"], row["trivial"])] = row["reached_by"]
    numbers = [int(n) for n in saved["unresolved_numbers"]]
    counts = {name: int(saved[name]) for name in _COUNTS}
    return Tally(**counts, reached=reached, unresolved=Counter(saved["unresolved"]), unresolved_numbers=numbers)
