"""Integers of 3n+1 that the loop search covers per second, at 2^71, compared with the same search without its shortcuts.

python tools/benchmark.py loop_search

Covered means decided, by the sieve, by a smaller number of the same path, or by following it (tools/loops/coverage.py). The
rows run in turns, `--rounds` times; shown are the median and the extremes over them. A core's second is a second of CPU time,
so that other work on the machine hardly counts; "followed" counts only the numbers that no shortcut decides.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

from loops.coverage import Coverage
from loops.exact import Map, follow
from loops.record import VERIFIED_BITS, Record, SearchConfig, Tally
from loops.search import search

from trainer.distributed.hardware import cores

START = 1 << VERIFIED_BITS


def main(arguments: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1 << 33, help="numbers a fast row covers in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sieve_bits", type=int, default=24)
    options = parser.parse_args(arguments)
    workers, count, bits = cores(), options.count, options.sieve_bits
    rows: dict[str, Callable[[], Tally]] = {
        "1 thread": lambda: _cover(START, count, bits),
        "1 thread, above 2^71 (sieve only)": lambda: _cover(START + (1 << bits), count, bits),
        "1 thread, sieve mod 2^16": lambda: _cover(START, count >> 2, 16),
        f"the whole search, {workers} threads": lambda: _search(count * workers, bits, workers),
        "Python's integers, no sieve": lambda: _in_python(20_000),
    }
    for covers in rows.values():
        covers()  # compiles, and builds the sieve
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, covers in rows.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            tally = covers()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
            rates[name].append((tally.covered / cpu_seconds, tally.followed / cpu_seconds, tally.covered / seconds))
    print(f"3n+1 from 2^{VERIFIED_BITS}, {platform.machine()}, {workers} cores, {options.rounds} rounds")
    print(f"{'':34} {'integers per second and core':^32} {'followed':>9} {'integers per':>13}")
    print(f"{'':34} {'median':>10} {'lowest':>10} {'highest':>10} {'likewise':>9} {'second':>13}")
    for name, measured in rates.items():
        per_core, followed, per_second = zip(*measured, strict=True)
        extremes = f"{min(per_core):10.3g} {max(per_core):10.3g}"
        print(f"{name:34} {median(per_core):10.3g} {extremes} {median(followed):9.3g} {median(per_second):13.3g}")


_coverages: dict[tuple[int, int, int], Coverage] = {}


def _cover(start: int, count: int, bits: int) -> Tally:
    if (start, count, bits) not in _coverages:
        _coverages[start, count, bits] = Coverage(_config(start, count), bits)
    tally = _coverages[start, count, bits].cover(start, start + count)
    assert tally is not None
    assert tally.covered == count
    return tally


def _search(count: int, bits: int, workers: int) -> Tally:
    record = Record(_config(START, count))
    search(record, bits, workers, lambda: None, print)
    return record.tally


def _in_python(count: int) -> Tally:
    for n in range(START, START + count):
        outcome, _ = follow(Map(3, 1), n, 100_000, 256, below=n)
        assert outcome == "fell"
    return Tally(covered=count, followed=count)


def _config(start: int, count: int) -> SearchConfig:
    return SearchConfig(Map(3, 1), start, count, 100_000, 256)
