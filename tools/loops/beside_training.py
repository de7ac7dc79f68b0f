"""Keeps a search at the lowest priority, and ends it with a training run."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer.reporting.run_directory import RunDirectory

POLL_SECONDS = 1.0
START_SECONDS = 120.0  # a training started by the same script takes a while until its status is `running`


def lower_priority() -> None:
    """Give this process, and the threads that it starts, the lowest priority."""
    os.nice(19)


def training_ended(run_dir: Path, wait_seconds: float = START_SECONDS) -> Callable[[], str | None]:
    """A function that returns why there is no training in `run_dir` any more, or None while it runs. Polls once a second.

    A training that does not run yet is waited for: None for the first `wait_seconds`. One that was killed, and could not
    update its status, is detected on the same machine, where its process no longer exists.
    """
    status_file = RunDirectory(run_dir).status
    started = time.monotonic()
    next_poll, reason, seen = 0.0, None, False

    def ended() -> str | None:
        nonlocal next_poll, reason, seen
        now = time.monotonic()
        if now < next_poll:
            return reason
        next_poll = now + POLL_SECONDS
        state = _state(status_file)
        seen = seen or state == "running"
        waiting = not seen and now - started < wait_seconds
        reason = None if state == "running" or waiting else f"the training in {run_dir} is {state}"
        return reason

    return ended


def _state(status_file: Path) -> str:
    """The state in a status.json; `killed` if it says running and the process is gone, `not there` without a readable file."""
    status = None
    with suppress(OSError, ValueError):
        status = json.loads(status_file.read_text(encoding="utf-8"))
    if not isinstance(status, dict) or "state" not in status:
        return "not there"
    if status["state"] == "running" and status.get("host") == socket.gethostname() and _gone(status.get("pid")):
        return "killed"
    return str(status["state"])


def _gone(pid: object) -> bool:
    """Whether there is no process of this number on this machine."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists, but belongs to another user
        return False
    return False
