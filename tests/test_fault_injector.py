"""The launcher of the tests: nothing that a test has started outlives it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fault_injector import Started, environment, send
from fault_injector import _environments as environments

WAIT_SECONDS = 100.0


def with_mark(mark: str) -> list[int]:
    return [pid for pid, values in environments() if f"{mark}=1".encode() in values]


def test_a_killed_pytest_leaves_no_process_behind(tmp_path: Path) -> None:
    """With a DDP run under way: launcher, two ranks and their data workers, most of them in sessions of their own."""
    mark = f"NESTED_{os.getpid()}_{time.monotonic_ns()}"
    argv = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner")]
    argv += ["tests/test_stopping_launches.py", "-k", "test_a_signal_to_one_rank"]
    process = Started(argv, tmp_path / "log.txt", environment(**{mark: "1"}))
    end = time.monotonic() + WAIT_SECONDS
    try:
        while not list(tmp_path.glob("inner/**/metrics.jsonl")):
            assert process.poll() is None, process.log.read_text()
            assert time.monotonic() < end, "no training"
            time.sleep(0.02)
        assert [pid for pid, values in environments() if {f"{mark}=1".encode(), b"LOCAL_RANK=1"} <= set(values)]
        process.kill()
        process.wait()
        while left := with_mark(mark):
            assert time.monotonic() < end + WAIT_SECONDS, f"still there: {left}"
            time.sleep(0.02)
    finally:
        process.kill_all()
        send(with_mark(mark), signal.SIGKILL)
