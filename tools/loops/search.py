"""Distributes stretches of the range to threads and merges their tallies in order, so that one number says what is covered."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loops.coverage import Coverage, Method
from loops.exact import Cycle
from loops.record import Record, Tally

STRETCH_SECONDS = 0.25  # long enough that scheduling costs nothing, short enough to stop soon
SAVE_SECONDS = 0.5  # between saves: what a SIGKILL can lose, besides stretches in progress
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Stretch:
    first: int
    stop: int
    method: Method
    result: Future[tuple[Tally | None, float]]


def search(
    record: Record,
    sieve_bits: int,
    workers: int,
    stopped: Callable[[], str | None],
    on_find: Callable[[str], None],
    on_progress: Callable[[Record], None] = lambda _: None,
    save: Callable[[], None] = lambda: None,
) -> str | None:
    """Cover the rest of the record's range. Returns the reason from `stopped` if that ended it early, None when complete.

    This thread alone cuts the stretches, each from the end of the one before, and adds their tallies in the same order: so
    whenever the record is saved, it counts exactly the numbers below its cursor. `on_find` is called with a line for each
    non-trivial cycle when a number first enters it, and for the first positive number of 3n+1 that does not fall.
    """
    cancelled = threading.Event()
    coverage = Coverage(record.config, sieve_bits, cancelled)
    units: dict[Method, int] = {"sieve": 1 << sieve_bits, "cycles": 1, "exact": 1}
    sizes = units.copy()
    waiting: deque[_Stretch] = deque()
    position, stop = record.next, record.config.stop
    last = saved = time.monotonic()
    reason = None
    with ThreadPoolExecutor(workers) as pool:
        try:
            while record.next < stop and not (reason := stopped()):
                while position < stop and len(waiting) < 2 * workers:
                    method, end = coverage.zone(position)
                    unit = units[method]  # a block is cut only where the range, or the method's zone, begins or ends in it
                    end = min(end, (position + sizes[method]) // unit * unit)
                    waiting.append(_Stretch(position, end, method, pool.submit(_timed, coverage, position, end)))
                    position = end
                try:
                    tally, seconds = waiting[0].result.result(timeout=POLL_SECONDS)
                except TimeoutError:
                    continue
                done = waiting.popleft()
                if tally is None or done.first != record.next or tally.covered != done.stop - done.first:
                    raise RuntimeError(f"from {done.first} to {done.stop - 1} not every number was covered once")
                _report(record, tally, done.method, on_find)
                now = time.monotonic()
                record.tally.add(tally)
                record.seconds, last = record.seconds + now - last, now
                target = int((done.stop - done.first) * STRETCH_SECONDS / max(seconds, 1e-6))
                sizes[done.method] = max(units[done.method], min(target, 8 * sizes[done.method]))
                on_progress(record)
                if now - saved > SAVE_SECONDS:
                    save()
                    saved = now
        finally:
            cancelled.set()
            for stretch in waiting:
                stretch.result.cancel()
    save()
    return reason


def _timed(coverage: Coverage, first: int, stop: int) -> tuple[Tally | None, float]:
    """(tally of a stretch, seconds it took)."""
    started = time.perf_counter()
    return coverage.cover(first, stop), time.perf_counter() - started


def _report(record: Record, tally: Tally, method: Method, on_find: Callable[[str], None]) -> None:
    """Call `on_find` for what `tally` has found and `record` does not have yet."""
    rule = record.config.rule
    for cycle in tally.reached:
        if not cycle.trivial and cycle not in record.tally.reached:
            on_find(describe(cycle, str(rule)))
    if rule.is_collatz and method != "cycles" and tally.unresolved_numbers and not record.tally.unresolved:
        n = tally.unresolved_numbers[0]
        if n > 0:
            on_find(f"3n+1: {n} does not fall below itself within the limits: unresolved")


def describe(cycle: Cycle, rule: str) -> str:
    """A one-line description of a cycle."""
    return f"{rule}: cycle of {cycle.smallest}, length {cycle.length} ({cycle.odd_steps} odd)"
