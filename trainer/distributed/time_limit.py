"""The time limit of a launch, and what a stop will take of it: the last save has to end inside the limit."""

from __future__ import annotations

import math
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

from trainer.distributed import signals
from trainer.errors import UserError

MEASURE_SECONDS = 0.5  # between measurements of how long this process waits for a core
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


class TimeLimit:
    """`hours` after `started` (`process_start_monotonic()`) or in `slurm_seconds`, whichever is earlier; None: no limit.

    How long a stop will take is estimated from past steps and saves, and more is allowed where this process has to wait for a
    CPU core. UserError for hours that are not above 0.
    """

    def __init__(
        self,
        hours: float | None,
        started: float,
        slurm_seconds: float | None = None,
        exit_seconds: float = EXIT_SECONDS,
    ) -> None:
        if hours is not None and not (math.isfinite(hours) and hours > 0):
            raise UserError(f"max_training_hours {hours} is no time limit; give hours above 0, or leave it out for no limit")
        limit = math.inf if hours is None else started + hours * 3600
        slurm_end = math.inf if slurm_seconds is None else time.monotonic() + slurm_seconds
        self._started, self._end, self._exit_seconds = started, min(limit, slurm_end), exit_seconds
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._saves: deque[tuple[float, float]] = deque(maxlen=5)
        """(seconds, `_slowdown` at that time)"""
        self._expected_save_seconds = 0.0
        self._processor: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=40)
        """(seconds run, seconds waited for a core) at the measurements of the last 20 s"""
        self._slowdown = 1.0
        """(run + waited) / run over that time"""
        self._next_measurement = 0.0

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
        """Seconds until the limit; infinite without one, negative after it."""
        return self._end - time.monotonic()

    def requires_stop(self, save: bool) -> bool:
        """Whether no more time is left than the end of the process takes; `save`: and, before it, a step and a save."""
        self._measure_slowdown()
        exit_seconds = self._exit_seconds + (self._slowdown - 1.0) * EXIT_PROCESSOR_SECONDS
        return self._end - time.monotonic() <= exit_seconds + (self._step_and_save_seconds() if save else 0.0)

    def over_before_the_first_step(self) -> str:
        """The line to print where it ends the launch before the first step."""
        taken, limit = time.monotonic() - self._started, self._end - self._started
        return (
            f"The time limit of {limit:.0f} s is over before the first step: the start has taken {taken:.0f} s, and to leave "
            "takes some too. Nothing was trained, nothing is lost; give it more time (--max_training_hours)"
        )

    def _step_and_save_seconds(self) -> float:
        # The ranks act on a vote a step later, and the save has to fit in after that.
        step = max(self._step_seconds, default=FIRST_STEP_SECONDS * self._slowdown)
        saves = (seconds * max(1.0, self._slowdown / slowdown) for seconds, slowdown in self._saves)
        save = max(saves, default=self._expected_save_seconds * self._slowdown)
        return 2 * step + 2.5 * save  # one save may have begun just before

    def _measure_slowdown(self) -> None:
        now = time.monotonic()
        if now >= self._next_measurement:
            self._next_measurement = now + MEASURE_SECONDS
            self._processor.append(signals.processor_seconds())
            ran, waited = (b - a for a, b in zip(self._processor[0], self._processor[-1], strict=True))
            self._slowdown = 1.0 + waited / max(ran, 0.1)
