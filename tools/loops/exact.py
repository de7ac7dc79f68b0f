"""The map and its cycles in Python's integers: for numbers of any size, and as the reference for the compiled loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["cycle", "fell", "too many steps", "too many bits"]


@dataclass(frozen=True)
class Map:
    """n -> n/2 if n is even, multiplier x n + addend if it is odd; multiplier + addend is even, so that odd becomes even."""

    multiplier: int
    addend: int

    def __str__(self) -> str:
        return f"{self.multiplier}n{self.addend:+d}"

    def __call__(self, n: int) -> int:
        """The number after `n`."""
        return self.multiplier * n + self.addend if n % 2 else n // 2

    @property
    def is_collatz(self) -> bool:
        """Whether this is 3n+1, for which the sieve and the verified numbers hold."""
        return (self.multiplier, self.addend) == (3, 1)


@dataclass(frozen=True)
class Cycle:
    """A cycle, identified by its number closest to 0 (the positive one if there are two)."""

    smallest: int
    length: int  # in steps of the map
    odd_steps: int  # those that start from an odd number
    trivial: bool  # known without a search: that of 0, or, if multiplier + 1 is a power of 2, that of the addend (1 in 3n+1)


def cycle_numbers(rule: Map, member: int) -> Iterator[int]:
    """The numbers of the cycle that `member` is on, starting with it. Endless if it is on none."""
    yield member
    n = rule(member)
    while n != member:
        yield n
        n = rule(n)


def cycle_through(rule: Map, member: int) -> Cycle:
    """The cycle that `member` is on."""
    numbers = list(cycle_numbers(rule, member))
    # With q + 1 a power of 2, the odd number d goes to (q + 1) d and halves back to d.
    known = rule.multiplier > 0 and (rule.multiplier + 1).bit_count() == 1 and rule.addend in numbers
    smallest = min(numbers, key=lambda n: (abs(n), -n))
    return Cycle(smallest, len(numbers), sum(n % 2 for n in numbers), known or smallest == 0)


def follow(rule: Map, n: int, max_steps: int, max_bits: int, below: int = 0) -> tuple[Outcome, int]:
    """Follow `n` to a cycle, by Brent's algorithm over the odd numbers on its path. Returns (outcome, last number).

    "cycle": the last number is on the cycle, and odd or 0. "fell": its absolute value is below `below`. "too many steps": more
    than `max_steps` of the plain map. "too many bits": it has more than `max_bits`.
    """
    if n == 0:
        return "cycle", 0
    x, steps = _make_odd(n)
    marked, power, since_marked = x, 1, 0
    while abs(x) >= below:
        x = rule.multiplier * x + rule.addend
        if x == 0:
            return "cycle", 0
        if x.bit_length() > max_bits:
            return "too many bits", x
        x, halvings = _make_odd(x)
        steps += 1 + halvings
        if abs(x) < below:
            break
        if steps > max_steps:
            return "too many steps", x
        if x == marked:
            return "cycle", x
        since_marked += 1
        if since_marked == power:
            marked, power, since_marked = x, 2 * power, 0
    return "fell", x


def _make_odd(n: int) -> tuple[int, int]:
    """(`n` halved until it is odd, number of halvings). `n` must not be 0."""
    halvings = (n & -n).bit_length() - 1
    return n >> halvings, halvings
