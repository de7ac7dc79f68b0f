"""How soon a run under torchrun that is killed at random is back, and what share of its time made progress."""

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
    """Of one kill. Seconds from it."""

    found: float
    """the other process has written down why it ends, or has gone"""
    stopped: float
    """no process of before is left"""
    started: float
    """the first process of after is there"""
    resumed: float
    """the first step after it, if only one that was done before"""
    new_step: float
    """the first step that was never done before"""
    twice: int
    """steps done twice"""


def measure(script: Path, flags: Sequence[str], folder: Path, kills: int, seed: int) -> int:
    """Train twice, killed and not, and print how they compare; the exit status, 1 where anything was lost."""
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
    """Two processes under torchrun, which starts them again."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1000"]
    argv = [*launcher, "--master_port", str(free_port()), str(script), *flags, *FLAGS.split(), "--output_dir", str(directory)]
    env = environment(SAMECURVE_CACHE=str(directory.parent / "cache"), PYTHONPATH=str(ROOT))
    return Started(argv, directory.with_suffix(".log"), env)


def until(holds: Callable[[], bool], run: Started, what: str) -> float:
    """Wait for it; the time then. TimeoutError."""
    end = time.monotonic() + LIMIT_SECONDS
    while not holds():
        if time.monotonic() > end or run.poll() is not None:
            raise TimeoutError(f"no {what} within {LIMIT_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return time.time()


def kill_one(run: Started, directory: Path, rank: int) -> Recovery | None:
    """SIGKILL a rank, and watch the launch come back; None if it is at its end."""
    before = [pid for pid in (run.rank(number) for number in (0, 1)) if pid is not None]
    if len(before) < 2 or (directory / "checkpoints" / "checkpoint_final").is_dir():
        return None
    victim, done = before[rank], int(max(row["step"] for row in rows(directory)))
    send([victim], signal.SIGKILL)
    killed = time.time()

    def state() -> str:
        with suppress(OSError, ValueError):
            return str(json.loads((directory / "status.json").read_text())["state"])
        return ""

    others = [pid for pid in before if pid != victim]
    found = until(lambda: state() == "failed" or not any(map(alive, others)), run, "end of the other process")
    stopped = until(lambda: not any(map(alive, before)), run, "end of all processes")
    started = until(lambda: run.rank(0) is not None, run, "new process")
    resumed = until(lambda: bool(rows(directory, killed)), run, "step after it")
    first = rows(directory, killed)[0]["step"]
    new_step = until(lambda: any(row["step"] > done for row in rows(directory, killed)), run, "new step")
    since = [moment - killed for moment in (found, stopped, started, resumed, new_step)]
    return Recovery(since[0], since[1], since[2], since[3], since[4], twice=int(done - first + 1))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def report(recoveries: Sequence[Recovery], seconds: float) -> str:
    """What is printed at the end."""
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
