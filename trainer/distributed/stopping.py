"""Requests to stop: one object per rank collects them, the ranks sum their votes, and all stop at the same step."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from trainer.distributed import signals
from trainer.distributed.signals import SIGNALS, launched, listen_to_signals
from trainer.distributed.standard_input import StandardInput
from trainer.distributed.stop_command import StopCommand
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
    STOP_WHEN = "stop_when"
    STOP_AT_STEP = "stop_at_step"
    LAST_STEP = "last step"
    TARGET_LOSS = "target loss"
    PATIENCE = "patience"
    ALREADY_FINISHED = "already finished"

    @property
    def finished(self) -> bool:
        """Whether the run is over; otherwise the same command continues it."""
        return self in (self.LAST_STEP, self.TARGET_LOSS, self.PATIENCE, self.ALREADY_FINISHED)

    @property
    def by_hand(self) -> bool:
        """Whether a person asked for it, who may want to see a plot. A scheduler would be waiting for the process to end."""
        return self in (self.SIGINT, self.STOP_FILE, self.STOP_TYPED)


# SIGTERM comes after the other signals: a launcher that got one of them sends its processes a SIGTERM.
REQUESTS = (
    StopReason.TIME_LIMIT,
    StopReason.SIGINT,
    StopReason.SIGUSR1,
    StopReason.SIGHUP,
    StopReason.SIGTERM,
    StopReason.STOP_FILE,
    StopReason.STOP_TYPED,
    StopReason.STOP_WHEN,
)
"""reasons that may come up at any moment, in order of priority; each rank votes on them"""
POLL_SECONDS = 0.5  # between looks at files and stdin: a network file system is slow
WATCH_SECONDS = 0.1  # between looks of the thread of `acted_on_at_once`
EXIT_SECONDS = 3.5  # allowed from the end of the last save to the end of the process
EXIT_PROCESSOR_SECONDS = 1.0  # CPU time in it, most of it the launcher's
FIRST_STEP_SECONDS = 0.2  # expected of a step until the first one has been timed


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
    """UserError for a time limit that is not above 0. None: no limit."""
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

    The time limit is `limit_hours` after `started` (`process_start_monotonic()`) or `slurm_end`, the end of the Slurm job on
    that clock, whichever is earlier. `run` is given on rank 0 only, which watches its `stop` and `status` files and stdin;
    `stop_when`, a command, on one process of each host.

    How long a stop will take is estimated from past steps and saves, and more is allowed where this process has to wait for a
    CPU core.
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
        stop_when: str | None = None,
    ) -> None:
        check_hours(limit_hours)
        limit = math.inf if limit_hours is None else started + limit_hours * 3600
        self._started, self._deadline = started, limit if slurm_end is None else min(limit, slurm_end)
        self._run, self._status, self._log = run, status, log
        self._requested: set[str] = set()
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._saves: deque[tuple[float, float]] = deque(maxlen=5)
        """(seconds, `_slowdown` at that time)"""
        self._expected_save_seconds = 0.0
        self._processor: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=40)
        """(seconds run, seconds waited for a core) at the looks of the last 20 s"""
        self._slowdown = 1.0
        """(run + waited) / run over that time"""
        self.unsaved = False
        """whether to end the process now would lose steps"""
        self._exit_seconds, self._stop_when = exit_seconds, stop_when
        self._command: StopCommand | None = None
        self._next_poll = 0.0
        self._stdin = StandardInput()
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
                handler = signal.signal(number, self._handle)
                self._previous[number] = signal.SIG_DFL if handler is None else handler
        self._stop_listening = listen_to_signals(self._hear)
        self._command = StopCommand(self._stop_when, self._log) if self._stop_when else None

    def close(self) -> None:
        """Restore the previous handlers; remove a `stop` file that was acted on. (A run killed before that stops once more.)"""
        if self._previous:
            self._stop_listening()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
        if self._command is not None:
            self._command.close()
        self._remove_stop_file()

    def votes(self) -> list[float]:
        """For each of REQUESTS 1.0 if this rank has to stop for it now, else 0.0. Takes microseconds, for every step."""
        # The ranks act on this vote a step later, and the save has to fit in after that.
        step = max(self._step_seconds, default=FIRST_STEP_SECONDS * self._slowdown)
        saves = (seconds * max(1.0, self._slowdown / slowdown) for seconds, slowdown in self._saves)
        save = max(saves, default=self._expected_save_seconds * self._slowdown)
        self._look(2 * step + 2.5 * save)  # one save may have begun just before
        return [float(reason in self._requested) for reason in REQUESTS] if self._requested else [0.0] * len(REQUESTS)

    def any_requested(self) -> bool:
        """Whether this rank has to stop now."""
        return any(self.votes())

    @contextmanager
    def acted_on_at_once(self, act: Callable[[StopReason], None]) -> Iterator[None]:
        """While nothing is unsaved: a thread calls `act(reason)` at the first request, whatever the main thread is doing.

        `act` should end the process. Stdin is not read meanwhile: the main thread may be in a debugger.
        """
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_SECONDS):
                self._look(0.0, typed=False)
                reason = next((reason for reason in REQUESTS if reason in self._requested), None)
                if reason is not None:
                    self._remove_stop_file()
                    return act(reason)

        watching = threading.Thread(target=watch, name="stop requests", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def before_the_first_step(self, reason: StopReason) -> str:
        """The line to print for a request that comes before the first step."""
        if reason != StopReason.TIME_LIMIT:
            return f"{reason} before the first step: nothing was trained, nothing is lost"
        taken, limit = time.monotonic() - self._started, self._deadline - self._started
        return (
            f"The time limit of {limit:.0f} s is over before the first step: the start has taken {taken:.0f} s, and to leave "
            "takes some too. Nothing was trained, nothing is lost; give it more time (--max_training_hours)"
        )

    def _look(self, seconds_needed: float, typed: bool = True) -> None:
        """Collect new requests. The time limit is one as soon as less time is left than `seconds_needed` and the exit take."""
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._processor.append(signals.processor_seconds())
            ran, waited = (b - a for a, b in zip(self._processor[0], self._processor[-1], strict=True))
            self._slowdown = 1.0 + waited / max(ran, 0.1)
            if self._run is not None:
                self._poll(self._run, typed)
        if self._command is not None and self._command.says_stop:
            self._requested.add(StopReason.STOP_WHEN)
        exit_seconds = self._exit_seconds + (self._slowdown - 1.0) * EXIT_PROCESSOR_SECONDS
        if now + seconds_needed + exit_seconds >= self._deadline:
            self._requested.add(StopReason.TIME_LIMIT)

    @staticmethod
    def decide(summed: Sequence[float]) -> StopReason | None:
        """The first of REQUESTS with a vote, from the votes summed over all ranks; None: go on."""
        return next((reason for reason, votes in zip(REQUESTS, summed, strict=True) if votes > 0), None)

    def record_step(self, seconds: float) -> None:
        """How long the last step took, its wait for data included."""
        self._step_seconds.append(seconds)

    def record_save(self, seconds: float) -> None:
        """How long the last save took."""
        self._saves.append((seconds, self._slowdown))

    def expect_save(self, seconds: float) -> None:
        """How long a save may take, until the first one has been timed."""
        self._expected_save_seconds = seconds

    def seconds_left(self) -> float:
        """Seconds until the time limit; infinite without one, negative after it."""
        return self._deadline - time.monotonic()

    def _remove_stop_file(self) -> None:
        if self._run is not None and StopReason.STOP_FILE in self._requested:
            with suppress(OSError):
                self._run.stop_file.unlink()

    def _handle(self, number: int, _: Any) -> None:
        """The signal handler, in the main thread."""
        self._requested.add(signal.Signals(number).name)
        signals.free_full_streams()

    def _hear(self, number: int) -> None:
        """Like `_handle`, but called at once in a thread, also while the main thread is in a C call."""
        self._requested.add(signal.Signals(number).name)
        if number == signal.SIGTERM:
            signals.terminating.set()
        self._leave_at_second_interrupt(number)

    def _leave_at_second_interrupt(self, number: int) -> None:
        if number == signal.SIGINT:
            self._first_interrupt = self._first_interrupt or time.monotonic()
            echo_seconds = 1.0 if launched(os.environ) else 0.2  # a launcher may pass the terminal's Ctrl-C on: one, not two
            if time.monotonic() - self._first_interrupt > echo_seconds:
                signals.say(f"\nsecond interrupt: leaving at once, {'without saving' if self.unsaved else 'nothing is lost'}\n")
                os._exit(INTERRUPTED)

    def _poll(self, run: RunDirectory, typed: bool) -> None:
        if os.path.lexists(run.stop_file):
            self._requested.add(StopReason.STOP_FILE)
        with suppress(OSError):  # mostly: no such file. One that cannot be removed must not be answered for ever.
            run.status_file.unlink()
            self._log(self._status())
        commands = self._stdin.commands() if typed else set()
        if "stop" in commands:
            self._requested.add(StopReason.STOP_TYPED)
        if "status" in commands:
            self._log(self._status())
        if commands - {"stop", "status"}:
            self._log("type `stop` to save and stop, or `status`")
