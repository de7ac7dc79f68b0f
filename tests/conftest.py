"""What holds for every test: signals act in what it starts as in a fresh shell, and nothing outlives pytest."""

from __future__ import annotations

import os
import signal

import pytest
from fault_injector import guard
from launching import keep_imports_frozen


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported, in the process that runs tests: pytest, or each of its workers."""
    # Two files at a time already: more threads would wait for each other. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    guard()
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # the workers must inherit whether a hangup is ignored, to ignore it too
    # Under nohup, or as a background job of a script, these end no pytest; but a handler, unlike what is ignored, is not
    # inherited by what it starts.
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """Once the tests are imported."""
    keep_imports_frozen()
