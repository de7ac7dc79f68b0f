import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.distributed import signals, time_limit
from trainer.distributed.time_limit import TimeLimit, slurm_seconds_left
from trainer.errors import BAD_INPUT, UserError

WAIT_SECONDS = 100.0  # for what comes at once on a machine that is not busy


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What TimeLimit reads the time from."""
    standing = Clock()
    monkeypatch.setattr(time_limit, "time", standing)
    monkeypatch.setattr(signals, "processor_seconds", lambda: (1.0, 0.0))  # nobody else uses the cores
    return standing


@pytest.mark.parametrize(
    ("seconds_left", "steps", "save", "stops"),
    [
        (100, [1], 1, False),
        (100, [1, 49, 1], 1, True),  # 2 x 49 + 2.5 + 3.5 > 100
        (100, [49, *[1] * 50], 1, False),  # long ago: a compilation
        (100, [1], 39, True),  # one may be under way, and then there is one more
        (100, [1], 37, False),
        (-1, [], 0, True),
        (1, [], 0, True),
        (5, [], 0, False),
    ],
)
def test_it_leaves_room_for_a_step_and_a_save(
    seconds_left: float, steps: list[float], save: float, stops: bool, clock: Clock
) -> None:
    for limit in (
        TimeLimit(1.0, clock.now - 3600 + seconds_left),
        TimeLimit(2.0, clock.now, slurm_seconds=seconds_left),
        TimeLimit(None, clock.now, slurm_seconds=seconds_left),
    ):
        for step in steps:
            limit.record_step(step)
        limit.expect_save(save)
        assert limit.requires_stop(save=True) == stops
        assert limit.seconds_left() == pytest.approx(seconds_left)
        limit.expect_save(1e9)
        limit.record_save(save)  # measured: the guess is forgotten
        assert limit.requires_stop(save=True) == stops


def test_it_leaves_room_for_the_end_of_the_process(clock: Clock) -> None:
    """Which takes longer with alerts and W&B."""
    limit = TimeLimit(1.0, clock.now, exit_seconds=20.0)
    clock.now += 3600 - 20.5
    assert not limit.requires_stop(save=True)
    clock.now += 1.0
    assert limit.requires_stop(save=True)


def test_what_a_stop_takes_grows_with_the_wait_for_a_core(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds this process ran one: all it does takes ten times as long."""
    monkeypatch.setattr(signals, "processor_seconds", lambda: (1.0, 9.0))
    for steps, saves, seconds in (([], [], 2 * 2 + 2.5 * 20), ([3], [], 2 * 3 + 2.5 * 20), ([3], [4], 2 * 3 + 2.5 * 4)):
        needed = seconds + time_limit.EXIT_SECONDS + 9 * time_limit.EXIT_PROCESSOR_SECONDS
        for left, stops in ((needed + 0.1, False), (needed - 0.1, True)):
            limit = TimeLimit(1.0, clock.now - 3600 + left)
            limit.expect_save(2.0)
            limit.requires_stop(save=False)  # in the start
            for step in steps:
                limit.record_step(step)
            for save in saves:
                limit.record_save(save)
            assert limit.requires_stop(save=True) == stops, (steps, saves)
            clock.now += 1
    quiet = TimeLimit(1.0, clock.now - 3600 + 36)  # 4 x 10 seconds of a save are expected now
    quiet.record_save(4.0)
    assert not quiet.requires_stop(save=False)
    assert quiet.requires_stop(save=True)


def test_the_wait_for_a_core_is_measured() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the kernel does not say")
    script = "import os, subprocess, time\nfrom trainer.distributed.signals import processor_seconds\n"
    script += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    script += "busy = subprocess.Popen(['sh', '-c', 'while :; do :; done'])\n"
    script += "while time.process_time() < 0.5: pass\nbusy.kill()\nprint(*processor_seconds())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=WAIT_SECONDS)
    ran, waited = map(float, done.stdout.split())
    assert 0.4 < ran < 5.0
    assert waited > 0.2 * ran  # another one wants the same core


def test_no_limit() -> None:
    limit = TimeLimit(None, time.monotonic())
    limit.record_step(1e9)
    assert not limit.requires_stop(save=True)
    assert limit.seconds_left() == math.inf


@pytest.mark.parametrize("hours", [0, -1, math.nan, math.inf, -math.inf])
def test_senseless_limit_is_refused(hours: float) -> None:
    with pytest.raises(UserError, match=f"max_training_hours {hours} ") as refused:
        TimeLimit(hours, time.monotonic())
    assert refused.value.exit_code == BAD_INPUT


def test_process_start_counts_what_came_before() -> None:
    script = "import time; time.sleep(0.7); from trainer.distributed.signals import process_start_monotonic as start\n"
    script += "print(time.monotonic() - start())"
    began = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(printed) <= time.monotonic() - began + 0.02
    if sys.platform == "linux":
        assert float(printed) >= 0.7


def test_slurm_end(tmp_path: Path) -> None:
    assert slurm_seconds_left({}) is None
    before = time.time()
    value = slurm_seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(before + 50)})
    assert value is not None
    assert 50 - (time.time() - before) <= value <= 50
    squeue = tmp_path / "squeue"
    environ = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_TIME_FORMAT": "relative"}
    for answer, seconds in (("$(date -d '+100 seconds' +%FT%T)", 100), ("N/A", None), ("", None)):
        squeue.write_text(f'#!/bin/sh\n[ "$*$SLURM_TIME_FORMAT" = "-h -j 7 -o %estandard" ] && echo "{answer}"\n')
        squeue.chmod(0o755)
        os_path, os.environ["PATH"] = os.environ["PATH"], environ["PATH"]  # where the command itself is looked up
        try:
            before = time.time()
            value = slurm_seconds_left(environ)
            took = time.time() - before
            if seconds is None:
                assert value is None
            else:
                assert value is not None
                assert seconds - took - 1 <= value <= seconds + took  # squeue prints whole seconds
        finally:
            os.environ["PATH"] = os_path
    assert slurm_seconds_left({"SLURM_JOB_ID": "7", "PATH": str(tmp_path / "nowhere")}) is None  # no squeue
