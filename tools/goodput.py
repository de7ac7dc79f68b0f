"""Kills ranks of a run under torchrun at random, and measures how soon it trains again and how much of its time is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fault_injector import ROOT, Started, different_tensors, environment, free_port, rows, send

PAUSE_SECONDS = (30.0, 60.0)
LIMIT_SECONDS = 120.0  # for one phase of a recovery
POLL_SECONDS = 0.02
FLAGS = "--log_every 1 --eval_every 0 --keep_last 2 --device cpu --no_use_tensorboard"


@dataclass(frozen=True)
class Recovery:
    """What follows one kill. Times are in seconds from it."""

    found: float
    """until the other process has written to status.json that the run failed, or has ended"""
    stopped: float
    """until all processes of the old launch have ended"""
    started: float
    """until the new rank 0 exists"""
    resumed: float
    """until the first step is logged, which may repeat one of before the kill"""
    new_step: float
    """until the first step that was not logged before the kill"""
    twice: int
    """steps that were done twice"""


def measure(script: Path, flags: Sequence[str], folder: Path, kills: int, seed: int) -> int:
    """Train once undisturbed and once with `kills`, and print how the runs compare.

    Returns the exit status: 1 if a run failed or hung, the final tensors differ, or nothing was killed.
    """
    whole, killed = folder / "uninterrupted", folder / "killed"
    if start(script, flags, whole).wait() != 0:
        print(f"goodput: the uninterrupted run failed: {whole.with_suffix('.log')}")
        return 1
    choice, recoveries = random.Random(seed), list[Recovery]()
    began, run = time.time(), start(script, flags, killed)
    try:
        until(lambda: bool(rows(killed)), run, "the first step")
        while len(recoveries) < kills and run.poll() is None:
            pause = time.monotonic() + choice.uniform(*PAUSE_SECONDS)
            while time.monotonic() < pause and run.poll() is None:
                time.sleep(POLL_SECONDS)
            recovery = kill_one(run, killed, choice.randrange(2))
            if recovery is not None:
                recoveries.append(recovery)
                print(f"goodput: {recoveries[-1]}", file=sys.stderr)
        code = run.wait(timeout=None)
    except TimeoutError as error:
        print(f"goodput: {error}; {killed.with_suffix('.log')}")
        return 1
    finally:
        run.kill_all()
    seconds = time.time() - began
    print(report(recoveries, seconds))
    names = different_tensors(*(run / "checkpoints" / "checkpoint_final" for run in (killed, whole))) if code == 0 else ["all"]
    end = "equal, bit for bit" if not names else f"different: {', '.join(names)}"
    print(f"end weights: {end}; the launcher exited with {code}")
    return int(bool(names) or not recoveries)


def start(script: Path, flags: Sequence[str], directory: Path) -> Started:
    """Start the run on two processes under torchrun, which restarts them when one fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1000"]
    argv = [*launcher, "--master_port", str(free_port()), str(script), *flags, *FLAGS.split(), "--output_dir", str(directory)]
    env = environment(SAMECURVE_CACHE=str(directory.parent / "cache"), PYTHONPATH=str(ROOT))
    return Started(argv, directory.with_suffix(".log"), env)


def until(holds: Callable[[], bool], run: Started, what: str) -> float:
    """Wait until `holds()`; returns the time. TimeoutError, naming `what`, after LIMIT_SECONDS or if the run has ended."""
    end = time.monotonic() + LIMIT_SECONDS
    while not holds():
        if time.monotonic() > end or run.poll() is not None:
            raise TimeoutError(f"no {what} within {LIMIT_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return time.time()


def kill_one(run: Started, directory: Path, rank: int) -> Recovery | None:
    """SIGKILL a rank and watch the launch recover. None, without a kill, if the run is about to end."""
    before = [pid for pid in (run.rank(number) for number in (0, 1)) if pid is not None]
    if len(before) < 2 or (directory / "checkpoints" / "checkpoint_final").is_dir():
        return None
    victim = before[rank]
    send([victim], signal.SIGKILL)
    killed = time.time()

    def state() -> str:
        with suppress(OSError, ValueError):
            return str(json.loads((directory / "status.json").read_text())["state"])
        return ""

    others = [pid for pid in before if pid != victim]
    found = until(lambda: state() == "failed" or not any(map(alive, others)), run, "end of the other process")
    stopped = until(lambda: not any(map(alive, before)), run, "end of all processes")
    done = int(max(row["step"] for row in rows(directory)))  # a killed rank 0 may have done a step that it had not logged yet
    began = time.time()
    started = until(lambda: run.rank(0) is not None, run, "new process")
    resumed = until(lambda: bool(rows(directory, began)), run, "step after it")
    first = rows(directory, began)[0]["step"]
    new_step = until(lambda: any(row["step"] > done for row in rows(directory, began)), run, "new step")
    since = [moment - killed for moment in (found, stopped, started, resumed, new_step)]
    return Recovery(since[0], since[1], since[2], since[3], since[4], twice=max(0, int(done - first + 1)))


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def report(recoveries: Sequence[Recovery], seconds: float) -> str:
    """The table that is printed at the end; `seconds`: duration of the run with kills."""
    lines = [
        f"{len(recoveries)} kills of one of two processes in {seconds:.0f} s on {os.cpu_count()} cores; seconds from the kill:"
    ]
    for name in ("found", "stopped", "started", "resumed", "new_step"):
        values = [getattr(recovery, name) for recovery in recoveries] or [0.0]
        lines.append(f"  {name:10} median {median(values):5.1f}   at most {max(values):5.1f}")
    lost = sum(recovery.new_step for recovery in recoveries)
    lines.append(f"steps done twice: {', '.join(str(recovery.twice) for recovery in recoveries)}")
    lines.append(f"share of the time that made progress: {1 - lost / seconds:.1%}")
    return "\n".join(lines)
