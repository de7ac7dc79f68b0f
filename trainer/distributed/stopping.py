"""Stop, and why? One object per rank collects every request to stop; all ranks add up their votes and leave together."""

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
        """Whether somebody asked for it who is there to look at the run; nothing is waiting for the process to be gone."""
        return self in (self.SIGINT, self.STOP_FILE, self.STOP_TYPED)


# SIGTERM is the last of the signals: a launcher that another signal killed shows up here as a SIGTERM.
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
"""what people and schedulers ask for, at any moment, in order of priority; each rank votes on these"""
POLL_SECONDS = 0.5  # files and stdin are looked at this often: a network file system is slow
WATCH_SECONDS = 0.1  # how often the thread looks that acts on requests at once
EXIT_SECONDS = 3.5  # from the end of the last save to the end of the process
EXIT_PROCESSOR_SECONDS = 1.0  # what that needs of a core, most of it the launcher
FIRST_STEP_SECONDS = 0.2  # what a step takes, until the first one has been timed


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
    the earlier wins. `run` is given on rank 0 only: its `stop` and `status` files, and stdin, are watched; the command
    `stop_when` on one process of each host.

    What a stop will take is estimated from what steps and saves have taken, and grows with the time that this process, in its
    start and since, had to wait for a core.
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
        """(seconds, the slowdown then)"""
        self._expected_save_seconds = 0.0
        self._processor: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=40)  # of the last 20 s
        self._slowdown = 1.0
        """seconds that a second of computation takes, as others use the cores too"""
        self.unsaved = False
        """whether the end of the process would lose steps"""
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
        """1.0 for each of REQUESTS that this rank has to stop now, else 0.0. Takes microseconds; call it every step."""
        # The ranks act on this vote a step later, and then the save has to fit.
        step = max(self._step_seconds, default=FIRST_STEP_SECONDS * self._slowdown)
        saves = (seconds * max(1.0, self._slowdown / slowdown) for seconds, slowdown in self._saves)
        save = max(saves, default=self._expected_save_seconds * self._slowdown)
        self._look(2 * step + 2.5 * save)  # of which one may have begun just before
        return [float(reason in self._requested) for reason in REQUESTS] if self._requested else [0.0] * len(REQUESTS)

    def any_requested(self) -> bool:
        """Whether this rank has to stop now."""
        return any(self.votes())

    @contextmanager
    def acted_on_at_once(self, act: Callable[[StopReason], None]) -> Iterator[None]:
        """Where nothing is unsaved and no other rank is needed: a thread calls `act(reason)` at the first request.

        Whatever the main thread does meanwhile; `act` should end the process. What is typed is not read: the main thread may
        be in a debugger.
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
        """What is to be said where a request comes then."""
        if reason != StopReason.TIME_LIMIT:
            return f"{reason} before the first step: nothing was trained, nothing is lost"
        taken, limit = time.monotonic() - self._started, self._deadline - self._started
        return (
            f"The time limit of {limit:.0f} s is over before the first step: the start has taken {taken:.0f} s, and to leave "
            "takes some too. Nothing was trained, nothing is lost; give it more time (--max_training_hours)"
        )

    def _look(self, seconds_needed: float, typed: bool = True) -> None:
        """Look for requests; the time limit is one as soon as no more is left than is needed before the process can end."""
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
        """The reason to stop, from the votes summed over all ranks: the first with a vote. None: go on."""
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
        """The same in a thread, at once, while the main thread is in a C call."""
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
