"""Stop, and why? One object per rank gathers every wish to stop; all ranks sum their votes and leave together."""

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
from typing import Any, Self

from trainer.errors import INTERRUPTED, Refusal
from trainer.run_directory import RunDirectory
from trainer.signals import SIGNALS, launched, listen_to_signals, stat_fields

# In order of priority. SIGTERM is the last signal: a launcher that another signal killed shows up here as a SIGTERM.
REASONS: tuple[str, ...] = ("time_limit", "SIGINT", "SIGUSR1", "SIGHUP", "SIGTERM", "stop_file", "stop_typed")
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
        raise Refusal(f"max_training_hours {hours} is no time limit; give hours above 0, or leave it out for no limit")


def finished_reason(
    step: int,
    total_steps: int,
    evaluations_without_better: int,
    patience: int,
    last_train_loss: float | None,
    target_loss: float | None,
) -> str | None:
    """Why training is complete after `step` steps, or None. patience 0 and target_loss None are off."""
    if step >= total_steps:
        return "last step"
    if target_loss is not None and last_train_loss is not None and last_train_loss <= target_loss:  # never for NaN
        return "target loss"
    if 0 < patience <= evaluations_without_better:
        return "patience"
    return None


class StopRequests:
    """Everything that asks this rank to stop early. A context manager; use it in the main thread.

    `limit_hours` count from `started` (`process_start_monotonic()`); `slurm_end` is the Slurm job's end on that clock;
    the earlier wins. `run` is given on rank 0 only: its `stop` and `status` files, and stdin, are watched.
    """

    def __init__(
        self,
        limit_hours: float | None,
        started: float,
        run: RunDirectory | None,
        status: Callable[[], str],
        say: Callable[[str], None],
        slurm_end: float | None = None,
        exit_seconds: float = EXIT_SECONDS,
    ) -> None:
        check_hours(limit_hours)
        limit = math.inf if limit_hours is None else started + limit_hours * 3600
        self._deadline = limit if slurm_end is None else min(limit, slurm_end)
        self._run, self._status, self._say = run, status, say
        self._asked: set[str] = set()
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
                handler = signal.signal(number, lambda number, _: self._asked.add(signal.Signals(number).name))
                self._previous[number] = signal.SIG_DFL if handler is None else handler
        self._stop_listening = listen_to_signals(self._leave_at_second_interrupt)

    def close(self) -> None:
        """Restore the previous handlers; remove an obeyed `stop` file. (A run killed before that stops once more.)"""
        if self._previous:
            self._stop_listening()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
        if self._run is not None and "stop_file" in self._asked:
            with suppress(OSError):
                self._run.stop_file.unlink()

    def votes(self) -> list[float]:
        """1.0 for each of REASONS for which this rank asks to stop now, else 0.0. Microseconds; call it every step."""
        now = time.monotonic()
        if self._run is not None and now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._poll(self._run)
        # The ranks act on this vote a step later, and then the save has to fit.
        step = max(self._step_seconds, default=0.0)
        save = max(self._save_seconds, default=self._expected_save_seconds)
        if now + 2 * step + 1.5 * save + self._exit_seconds >= self._deadline:
            self._asked.add("time_limit")
        return [float(reason in self._asked) for reason in REASONS]

    @staticmethod
    def decide(summed: Sequence[float]) -> str | None:
        """The reason to stop, from the votes summed over all ranks: the first with a vote. None: go on."""
        return next((reason for reason, votes in zip(REASONS, summed, strict=True) if votes > 0), None)

    def note_step(self, seconds: float) -> None:
        """How long the last step took, its wait for data included."""
        self._step_seconds.append(seconds)

    def note_save(self, seconds: float) -> None:
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
            self._asked.add("stop_file")
        with suppress(OSError):  # mostly: no such file. One that cannot be removed must not be answered for ever.
            run.status_file.unlink()
            self._say(self._status())
        self._read_stdin()

    def _read_stdin(self) -> None:
        """Obey the lines waiting on stdin. Polled here, not read by a thread, which would steal a debugger's input."""
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
        words = {line.strip().lower() for line in lines} - {b""}
        if b"stop" in words:
            self._asked.add("stop_typed")
        if b"status" in words:
            self._say(self._status())
        if words - {b"stop", b"status"}:
            self._say("type `stop` to save and stop, or `status`")


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
