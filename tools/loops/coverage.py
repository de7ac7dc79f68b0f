"""Covers a stretch of numbers by the method that suits them. Why most of them may be skipped:

3n+1, for positive n of at least 2^sieve_bits. Each number is in exactly one of three parts:

- by_sieve: n mod 2^sieve_bits shows that n falls below itself within sieve_bits steps (`sieve`);
- by_predecessor: of the others, those that a smaller number leads to. n = 2 mod 3 comes from (2n - 1)/3, and
  n = 4 mod 9 from (8n - 5)/9, in one and three steps of T. They are skipped only where the numbers below the start are
  verified (start <= 2^71);
- followed, until they are below themselves.

So every n that is not unresolved reaches 1 if a smaller number does, and that if a smaller one does, down to an unresolved
number or one below the start. Hence: if all positive numbers below the start reach 1, and the unresolved do, all do. From a
start above 2^71 the first "if" is open: there only falling below itself counts, and shows that n is not the smallest number of
a cycle.

Everything else (another map, negative numbers, small ones) is followed into a cycle by Brent's algorithm; nothing is skipped.
What does not fit 128 bits is followed in Python's integers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import numpy as np

from loops import compiled, exact, sieve
from loops.record import SearchConfig, Tally

Method = Literal["sieve", "cycles", "exact"]
CYCLES_BATCH = 1 << 14  # numbers of one compiled call: what Ctrl-C waits for

_WORD = (1 << 64) - 1


class Coverage:
    """Covers stretches of one search. Threads may share it: compiled code releases the GIL."""

    def __init__(self, config: SearchConfig, sieve_bits: int, cancelled: threading.Event | None = None) -> None:
        self.config, self.sieve_bits = config, sieve_bits
        self._cancelled = cancelled or threading.Event()
        self._cycles: dict[int, exact.Cycle] = {}  # by each odd number on it, and 0
        bound = 1 << compiled.BOUND_BITS
        self._zones: list[tuple[int | None, Method]] = [(1 - bound, "exact"), (bound, "cycles"), (None, "exact")]
        if config.rule.is_collatz:
            self._zones[1:2] = [(1 << sieve_bits, "cycles"), (bound, "sieve")]
            self._sieve = sieve.build(sieve_bits)
            self._factors, self._addends = sieve.jump_table(compiled.JUMP_BITS)
            self._skipped_mod_9 = np.array([config.rests_on_verified and (n % 3 == 2 or n == 4) for n in range(9)])
            # A step of T may be two of the plain map. All could be: so this many jumps never exceed max_steps.
            self._max_jumps = (config.max_steps // 2 - sieve_bits) // compiled.JUMP_BITS

    def zone(self, n: int) -> tuple[Method, int]:
        """(method for `n`, the first number after `n` that needs another one, or the end of the range)."""
        stop = self.config.stop
        for end, method in self._zones:
            if end is None or n < end:
                return method, stop if end is None else min(end, stop)
        raise AssertionError("the last zone has no end")

    def cover(self, first: int, stop: int) -> Tally | None:
        """Cover first <= n < stop, which must be in one zone. Returns the tally; None if cancelled. RuntimeError if the counts
        disagree."""
        method, end = self.zone(first)
        assert first < stop <= end
        tally = Tally()
        cover: Callable[[int, int, Tally], None] = getattr(self, f"_by_{method}")
        step = {"sieve": 1 << self.sieve_bits, "cycles": CYCLES_BATCH, "exact": 1}[method]
        while first < stop:
            if self._cancelled.is_set():
                return None
            border = min(stop, (first // step + 1) * step)
            cover(first, border, tally)
            first = border
        if self._cancelled.is_set():  # possibly inside the last batch
            return None
        tally.covered = tally.by_sieve + tally.by_predecessor + tally.followed
        return tally

    def _by_sieve(self, first: int, stop: int, tally: Tally) -> None:
        """Follow what the sieve leaves of numbers in one block of 2^sieve_bits, until they fall."""
        block = first >> self.sieve_bits
        offset = block << self.sieve_bits
        surviving = self._sieve.survivors(first - offset, stop - offset)
        given_up = np.empty(surviving, np.uint32)
        followed, skipped, stuck = compiled.follow_block(
            *_pair(block),
            self.sieve_bits,
            first - offset,
            stop - offset,
            self._sieve.residues,
            self._sieve.images,
            self._sieve.groups,
            sieve.POWERS_OF_3,
            self._skipped_mod_9,
            self._factors,
            self._addends,
            self._max_jumps,
            given_up,
        )
        if followed + skipped != surviving:
            raise RuntimeError(f"{followed} + {skipped} of {surviving} numbers from {first} to {stop - 1} were seen")
        tally.by_sieve += stop - first - surviving
        tally.by_predecessor += skipped
        tally.followed += followed
        for residue in sorted(given_up[:stuck].tolist()):
            self._redo(offset + residue, tally)

    def _by_cycles(self, first: int, stop: int, tally: Tally) -> None:
        """Follow all numbers into a cycle, in compiled code."""
        rule = self.config.rule
        ends = np.empty(stop - first, np.uint8)
        low, high = np.empty(stop - first, np.uint64), np.empty(stop - first, np.uint64)
        compiled.find_cycles(*_pair(first), rule.multiplier, rule.addend, self.config.max_steps, ends, low, high)
        tally.followed += stop - first
        entered = ends == compiled.CYCLE
        members, counts = np.unique(np.stack([low[entered], high[entered]], axis=1), axis=0, return_counts=True)
        for (member_low, member_high), count in zip(members.tolist(), counts.tolist(), strict=True):
            tally.reached[self._cycle(_signed(member_low, member_high))] += count
        for i in np.flatnonzero(~entered).tolist():
            if ends[i] == compiled.TOO_LONG:
                tally.give_up(first + i, "too many steps")
            elif self._cancelled.is_set():
                return  # `cover` discards the tally
            else:
                self._redo(first + i, tally)

    def _by_exact(self, first: int, stop: int, tally: Tally) -> None:
        """Follow all numbers in Python's integers."""
        for n in range(first, stop):
            tally.followed += 1
            self._redo(n, tally)

    def _redo(self, n: int, tally: Tally) -> None:
        """Follow `n` in Python's integers, and count the outcome."""
        config = self.config
        below = n if config.rule.is_collatz and n >= 1 << self.sieve_bits else 0
        outcome, last = exact.follow(config.rule, n, config.max_steps, config.max_bits, below)
        tally.redone_exactly += 1
        if outcome == "cycle":
            tally.reached[self._cycle(last)] += 1
        elif outcome != "fell":
            tally.give_up(n, outcome)

    def _cycle(self, member: int) -> exact.Cycle:
        """The cycle that `member`, odd or 0, is on."""
        if member not in self._cycles:
            cycle = exact.cycle_through(self.config.rule, member)
            self._cycles.update({n: cycle for n in exact.cycle_numbers(self.config.rule, member) if n % 2 or n == 0})
        return self._cycles[member]


def _pair(n: int) -> tuple[np.uint64, np.uint64]:
    """`n` in two's complement, as (low, high)."""
    return np.uint64(n & _WORD), np.uint64(n >> 64 & _WORD)


def _signed(low: int, high: int) -> int:
    """The inverse of `_pair`."""
    value = high << 64 | low
    return value - (1 << 128) if high >> 63 else value
