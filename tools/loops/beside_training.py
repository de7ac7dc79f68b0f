"""Searching on what a training run leaves of the processors, for as long as it runs."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer.run_directory import RunDirectory

LOOK_SECONDS = 1.0
START_SECONDS = 120.0  # a training started by the same script takes a while to say that it runs


def give_way() -> None:
    """Take the lowest priority: this process, and the threads that it starts, run when no other wants to."""
    os.nice(19)


def training_ended(run_dir: Path, wait_seconds: float = START_SECONDS) -> Callable[[], str | None]:
    """A function that says why there is no training in `run_dir` any more, or None while it runs. Looks once a second.

    A training that does not run yet is waited for: None for the first `wait_seconds`. One that was killed and could not
    say so is noticed on its own machine, where its process is gone.
    """
    status_file = RunDirectory(run_dir).status
    began = time.monotonic()
    next_look, answer, seen = 0.0, None, False

    def ended() -> str | None:
        nonlocal next_look, answer, seen
        now = time.monotonic()
        if now < next_look:
            return answer
        next_look = now + LOOK_SECONDS
        state = _state(status_file)
        seen = seen or state == "running"
        waiting = not seen and now - began < wait_seconds
        answer = None if state == "running" or waiting else f"the training in {run_dir} is {state}"
        return answer

    return ended


def _state(status_file: Path) -> str:
    """`running`, or what it is instead."""
    status = None
    with suppress(OSError, ValueError):
        status = json.loads(status_file.read_text(encoding="utf-8"))
    if not isinstance(status, dict) or "state" not in status:
        return "not there"
    if status["state"] == "running" and status.get("host") == socket.gethostname() and _gone(status.get("pid")):
        return "killed"
    return str(status["state"])


def _gone(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and another user's
        return False
    return False
