"""For every test: signals act on the processes that it starts as in a fresh shell, and no process outlives pytest."""

from __future__ import annotations

import os
import signal

import pytest
from fault_injector import guard
from launching import keep_imports_frozen


def pytest_configure(config: pytest.Config) -> None:
    """Called before any test is imported, in pytest and in each of its workers."""
    # Before torch is imported, which reads it. Two test files run at a time already: more threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guard()
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # the workers have to inherit ignored signals, and come here themselves
    # Under nohup, or in a background job of a script, these signals are ignored, which the processes of tests would inherit. A
    # handler that does nothing is not inherited, and keeps pytest alive as well.
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """Called once the tests are imported."""
    keep_imports_frozen()
