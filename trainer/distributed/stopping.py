"""Stop, and why? One object per rank collects every request to stop; all ranks add up their votes and leave together."""

from __future__ import annotations

import math
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from trainer.distributed.signals import SIGNALS, launched, listen_to_signals, stat_fields
from trainer.errors import INTERRUPTED, UserError
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.command_line.sections import Run
    from trainer.reporting.run_directory import RunDirectory


class StopReason(StrEnum):
    """Why a launch ended."""

    TIME_LIMIT = "time_limit"
    SIGINT = "SIGINT"
    SIGUSR1 = "SIGUSR1"
    SIGHUP = "SIGHUP"
    SIGTERM = "SIGTERM"
    STOP_FILE = "stop_file"
    STOP_TYPED = "stop_typed"
    STOP_AT_STEP = "stop_at_step"
    LAST_STEP = "last step"
    TARGET_LOSS = "target loss"
    PATIENCE = "patience"
    ALREADY_FINISHED = "already finished"

    @property
    def finished(self) -> bool:
        """Whether the run is over; otherwise the same command continues it."""
        return self in (self.LAST_STEP, self.TARGET_LOSS, self.PATIENCE, self.ALREADY_FINISHED)


# SIGTERM is the last of the signals: a launcher that another signal killed shows up here as a SIGTERM.
REQUESTS = (
    StopReason.TIME_LIMIT,
    StopReason.SIGINT,
    StopReason.SIGUSR1,
    StopReason.SIGHUP,
    StopReason.SIGTERM,
    StopReason.STOP_FILE,
    StopReason.STOP_TYPED,
)
"""what people and schedulers ask for, at any moment, in order of priority; each rank votes on these"""
POLL_SECONDS = 0.5  # files and stdin are looked at this often: a network file system is slow
EXIT_SECONDS = 3.5  # from the end of the last save to the end of the process, on a machine that is busy with others


def slurm_seconds_left(environ: Mapping[str, str]) -> float | None:
    """Seconds until Slurm ends this job; None outside Slurm or without an end. Asks its controller: rank 0 only."""
    with suppress(KeyError, ValueError):
        return float(environ["SLURM_JOB_END_TIME"]) - time.time()  # newer versions of Slurm set it
    with suppress(KeyError, ValueError, OSError, subprocess.SubprocessError):  # ValueError: without an end, it is N/A
        command = ["squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", "%e"]
        standard_times = {**environ, "SLURM_TIME_FORMAT": "standard"}
        answer = subprocess.run(command, env=standard_times, capture_output=True, text=True, timeout=10, check=True)
        return datetime.fromisoformat(answer.stdout.strip()).timestamp() - time.time()
    return None


def check_hours(hours: float | None) -> None:
    """Refuse a time limit that is not a length of time. None means no limit."""
    if hours is not None and not (math.isfinite(hours) and hours > 0):
        raise UserError(f"max_training_hours {hours} is no time limit; give hours above 0, or leave it out for no limit")


def finished_reason(state: TrainState, total_steps: int, run: Run) -> StopReason | None:
    """Why the run is complete, or None; the same on every rank."""
    if state.step >= total_steps:
        return StopReason.LAST_STEP
    if run.target_loss is not None and state.train_loss is not None and state.train_loss <= run.target_loss:  # never for NaN
        return StopReason.TARGET_LOSS
    if 0 < run.patience <= state.evaluations_without_improvement:
        return StopReason.PATIENCE
    return None


class StopRequests:
    """Every request to stop early that reaches this rank. A context manager; use it in the main thread.

    `limit_hours` count from `started` (`process_start_monotonic()`); `slurm_end` is the Slurm job's end on that clock;
    the earlier wins. `run` is given on rank 0 only: its `stop` and `status` files, and stdin, are watched.
    """

    def __init__(
        self,
        limit_hours: float | None,
        started: float,
        run: RunDirectory | None,
        status: Callable[[], str],
        log: Callable[[str], None],
        slurm_end: float | None = None,
        exit_seconds: float = EXIT_SECONDS,
    ) -> None:
        check_hours(limit_hours)
        limit = math.inf if limit_hours is None else started + limit_hours * 3600
        self._deadline = limit if slurm_end is None else min(limit, slurm_end)
        self._run, self._status, self._log = run, status, log
        self._requested: set[str] = set()
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._save_seconds: deque[float] = deque(maxlen=5)
        self._expected_save_seconds = 0.0
        self._exit_seconds = exit_seconds
        self._next_poll = 0.0
        self._stdin, self._typed = _stdin_kind(), b""
        self._previous: dict[signal.Signals, Any] = {}
        self._first_interrupt = 0.0

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def install(self) -> None:
        """Catch the signals. A SIGHUP that is ignored already (nohup) stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                handler = signal.signal(number, lambda number, _: self._requested.add(signal.Signals(number).name))
                self._previous[number] = signal.SIG_DFL if handler is None else handler
        self._stop_listening = listen_to_signals(self._leave_at_second_interrupt)

    def close(self) -> None:
        """Restore the previous handlers; remove a `stop` file that was acted on. (A run killed before that stops once more.)"""
        if self._previous:
            self._stop_listening()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
        if self._run is not None and StopReason.STOP_FILE in self._requested:
            with suppress(OSError):
                self._run.stop_file.unlink()

    def votes(self) -> list[float]:
        """1.0 for each of REQUESTS that this rank has to stop now, else 0.0. Takes microseconds; call it every step."""
        now = time.monotonic()
        if self._run is not None and now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._poll(self._run)
        # The ranks act on this vote a step later, and then the save has to fit.
        step = max(self._step_seconds, default=0.0)
        save = max(self._save_seconds, default=self._expected_save_seconds)
        if now + 2 * step + 1.5 * save + self._exit_seconds >= self._deadline:
            self._requested.add(StopReason.TIME_LIMIT)
        return [float(reason in self._requested) for reason in REQUESTS]

    def any_requested(self) -> bool:
        """Whether this rank has to stop now."""
        return any(self.votes())

    @staticmethod
    def decide(summed: Sequence[float]) -> StopReason | None:
        """The reason to stop, from the votes summed over all ranks: the first with a vote. None: go on."""
        return next((reason for reason, votes in zip(REQUESTS, summed, strict=True) if votes > 0), None)

    def record_step(self, seconds: float) -> None:
        """How long the last step took, its wait for data included."""
        self._step_seconds.append(seconds)

    def record_save(self, seconds: float) -> None:
        """How long the last save took."""
        self._save_seconds.append(seconds)

    def expect_save(self, seconds: float) -> None:
        """How long a save may take, until the first one has been timed."""
        self._expected_save_seconds = seconds

    def seconds_left(self) -> float:
        """Seconds until the time limit; infinite without one, negative after it."""
        return self._deadline - time.monotonic()

    def _leave_at_second_interrupt(self, number: int) -> None:
        if number == signal.SIGINT:
            self._first_interrupt = self._first_interrupt or time.monotonic()
            echo_seconds = 1.0 if launched(os.environ) else 0.2  # a launcher may pass the terminal's Ctrl-C on: one, not two
            if time.monotonic() - self._first_interrupt > echo_seconds:
                os.write(2, b"\nsecond interrupt: leaving at once, without saving\n")
                os._exit(INTERRUPTED)

    def _poll(self, run: RunDirectory) -> None:
        if os.path.lexists(run.stop_file):
            self._requested.add(StopReason.STOP_FILE)
        with suppress(OSError):  # mostly: no such file. One that cannot be removed must not be answered for ever.
            run.status_file.unlink()
            self._log(self._status())
        self._read_stdin()

    def _read_stdin(self) -> None:
        """Act on the lines waiting on stdin. Polled here, not read by a thread, which would steal a debugger's input."""
        if self._stdin is None or (self._stdin == "terminal" and not _owns_terminal()):
            return
        # Should the shell take the terminal back right now, a blocked SIGTTIN makes the read fail, not suspend us.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        received = None
        with suppress(OSError):
            received = os.read(0, 65536) if select.select([0], [], [], 0)[0] else None
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if received is None:
            return
        if not received:
            self._stdin, received = None, b"\n"  # a last line may lack its end
        *lines, self._typed = (self._typed[-100:] + received).split(b"\n")
        commands = {line.strip().lower() for line in lines} - {b""}
        if b"stop" in commands:
            self._requested.add(StopReason.STOP_TYPED)
        if b"status" in commands:
            self._log(self._status())
        if commands - {b"stop", b"status"}:
            self._log("type `stop` to save and stop, or `status`")


def _stdin_kind() -> str | None:
    """`pipe`, `terminal`, or None for what nobody types into: /dev/null, a file, a closed stdin."""
    if sys.stdin is None:  # closed when Python started: by now descriptor 0 may be any other file
        return None
    with suppress(OSError):
        mode = os.fstat(0).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe"
        if os.isatty(0):
            return "terminal"
    return None


def _owns_terminal() -> bool:
    """Whether we are the foreground job of the terminal on stdin: a read in the background suspends the job."""
    with suppress(OSError):
        return os.tcgetpgrp(0) == os.getpgrp()
    # torchrun gives each process a session of its own, outside the terminal's: then its own job must be the foreground.
    with suppress(OSError, ValueError, IndexError):
        _, _, group, _, terminal, foreground = stat_fields(os.getppid())[:6]
        return launched(os.environ) and group == foreground and int(terminal) == os.fstat(0).st_rdev
    return False
