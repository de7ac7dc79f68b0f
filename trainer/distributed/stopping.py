"""Why a launch stops: one object per rank collects the requests, the ranks sum their votes, and all stop at the same step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from trainer.distributed.standard_input import StandardInput
from trainer.distributed.stop_command import StopCommand
from trainer.distributed.stop_signals import StopSignals
from trainer.distributed.time_limit import TimeLimit
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

    `run` is given on rank 0 only, which watches its `stop` and `status` files and stdin; `stop_when`, a command, on one process
    of each host.
    """

    def __init__(
        self,
        time_limit: TimeLimit,
        run: RunDirectory | None,
        status: Callable[[], str],
        log: Callable[[str], None],
        stop_when: str | None = None,
    ) -> None:
        self.time_limit, self.signals = time_limit, StopSignals()
        self._run, self._status, self._log, self._stop_when = run, status, log, stop_when
        self._stdin, self._next_poll = StandardInput(), 0.0
        self._command: StopCommand | None = None
        self._requested: set[str] = set()

    def __enter__(self) -> Self:
        self.signals.catch()
        self._command = StopCommand(self._stop_when, self._log) if self._stop_when else None
        return self

    def __exit__(self, *_: object) -> None:
        """Remove a `stop` file that was acted on. (A run killed before that stops once more.)"""
        self.signals.release()
        if self._command is not None:
            self._command.close()
        self._remove_stop_file()

    def votes(self) -> list[float]:
        """For each of REQUESTS 1.0 if this rank has to stop for it now, else 0.0. Takes microseconds, for every step."""
        self._collect(training=True)
        return [float(reason in self._requested) for reason in REQUESTS] if self._requested else [0.0] * len(REQUESTS)

    @staticmethod
    def decide(summed: Sequence[float]) -> StopReason | None:
        """The first of REQUESTS with a vote, from the votes summed over all ranks; None: go on."""
        if not any(summed):
            return None
        return next((reason for reason, votes in zip(REQUESTS, summed, strict=True) if votes > 0))

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
                self._collect(training=False)
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
        if reason == StopReason.TIME_LIMIT:
            return self.time_limit.over_before_the_first_step()
        return f"{reason} before the first step: nothing was trained, nothing is lost"

    def _collect(self, training: bool) -> None:
        """Add the new requests. `training`: stdin is read, and to stop takes a step and a save."""
        now = time.monotonic()
        if self._run is not None and now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._poll(self._run, self._stdin.commands() if training else set())
        self._requested |= self.signals.received
        if self._command is not None and self._command.says_stop:
            self._requested.add(StopReason.STOP_WHEN)
        if self.time_limit.requires_stop(save=training):
            self._requested.add(StopReason.TIME_LIMIT)

    def _poll(self, run: RunDirectory, typed: set[str]) -> None:
        if os.path.lexists(run.stop_file):
            self._requested.add(StopReason.STOP_FILE)
        with suppress(OSError):  # mostly: no such file. One that cannot be removed must not be answered for ever.
            run.status_file.unlink()
            self._log(self._status())
        if "stop" in typed:
            self._requested.add(StopReason.STOP_TYPED)
        if "status" in typed:
            self._log(self._status())
        if typed - {"stop", "status"}:
            self._log("type `stop` to save and stop, or `status`")

    def _remove_stop_file(self) -> None:
        if self._run is not None and StopReason.STOP_FILE in self._requested:
            with suppress(OSError):
                self._run.stop_file.unlink()
