"""Fault injection into real launches: starts a training command, and kills it at a moment that shows in its files.

Used by tools/torture.py and by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
MARK = "SAMECURVE_STARTED_AS"
GUARD = f"SAMECURVE_GUARDED_BY_{uuid.uuid4().hex}"  # unique, because guarded processes may guard others
COPYING = "copying"
"""the file in a run directory by which `marked_run.py` shows a copy"""
POLL_SECONDS = 0.0002  # a save of a tiny model takes a few milliseconds
FAMILY_SECONDS = 1.0  # between searches for new processes of a launch


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(kind: str) -> int:
    """Number of processes of a launch: 1 for `one`, 2 for `fsdp` and others, 3 for `fsdp:3`, 4 for `hsdp` (2 x 2)."""
    name, _, number = kind.partition(":")
    return int(number or {"one": 1, "hsdp": 4}.get(name, 2))


def command(kind: str, script: Path, *arguments: str) -> list[str]:
    """The command line of a launch: `python` for kind `one`, else `accelerate launch` with accelerate_configs/{kind}.yaml."""
    if kind == "one":
        return [sys.executable, str(script), *arguments]
    name = kind.partition(":")[0]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    options = ["--num_processes", str(processes_of(kind)), "--main_process_port", str(free_port())]
    if name == "hsdp":
        options += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]
    return [*launcher, *options, str(script), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the variables of an outer launcher, with `extra` ones.

    OMP_NUM_THREADS is 1: with more threads, tiny steps mostly wait for threads that are not scheduled.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "PET_", "WANDB_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **extra}


@functools.cache
def guard() -> None:
    """Start a watchdog that kills all descendants of this process when it ends, however it ends.

    They are recognised by a variable in their environment. PR_SET_PDEATHSIG would reach direct children only.
    """
    os.environ[GUARD] = "1"
    unmarked = {name: value for name, value in os.environ.items() if name != GUARD}
    no_streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    watchdog = [sys.executable, __file__, GUARD, str(os.getpid())]
    # In a new session: a signal to this process's group must not end it.
    guard.watchdog = subprocess.Popen(watchdog, env=unmarked, start_new_session=True, **no_streams)  # type: ignore[attr-defined]


def watch(mark: str, guarded: int) -> None:
    """The watchdog: wait until the process `guarded`, its parent, has ended; then SIGKILL every process with the mark."""
    while os.getppid() == guarded:
        time.sleep(0.2)
    while remaining := [pid for pid, values in _environments() if f"{mark}=1".encode() in values]:
        send(remaining, signal.SIGKILL)
        time.sleep(0.05)


class Started(subprocess.Popen[bytes]):
    """A running command in a new session, and its family: all processes that have its mark in their environment.

    The mark is needed because launchers give each rank a session of its own, and data workers are children of a fork server:
    neither the process group nor the command line identifies them all. `guard` ends the family with this process.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, **options: object) -> None:
        guard()
        self.mark, self.since, self.log = uuid.uuid4().hex, time.time(), log
        marked = {**(environment() if env is None else env), MARK: self.mark, GUARD: "1"}
        options = {"stdin": subprocess.DEVNULL, "cwd": ROOT, **options}
        with log.open("ab") as out:
            super().__init__(  # type: ignore[call-overload]
                list(argv), env=marked, stdout=out, stderr=out, start_new_session=True, **options
            )

    def family(self) -> list[int]:
        """Process ids of the living members: launcher, ranks, data workers, and whatever else was started."""
        return [pid for pid, values in _environments() if f"{MARK}={self.mark}".encode() in values]

    def rank(self, number: int) -> int | None:
        """The process id of a rank, or None: the oldest process with that RANK, which data workers inherit."""
        marks = {f"{MARK}={self.mark}".encode(), f"RANK={number}".encode()}
        return min((pid for pid, values in _environments() if marks <= set(values)), key=_start_ticks, default=None)

    def kill_all(self) -> None:
        """SIGKILL to the whole family."""
        send([*self.family(), *([self.pid] if self.poll() is None else [])], signal.SIGKILL)
        self.wait(timeout=30)

    def orphans(self, seconds: float) -> list[int]:
        """Processes of the family that are still alive `seconds` after the command has ended."""
        end = time.monotonic() + seconds
        while (remaining := self.family()) and time.monotonic() < end:
            time.sleep(0.02)
        return remaining


def _environments() -> list[tuple[int, list[bytes]]]:
    """(process id, [b"NAME=value"]) of all processes whose environment this one may read."""
    environments = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's; a zombie has none
                environments.append((int(entry), Path("/proc", entry, "environ").read_bytes().split(b"\0")))
    return environments


def _start_ticks(pid: int) -> float:
    """When a process started, in clock ticks since boot; infinity if it has ended. Pids, which are reused, give no order."""
    with contextlib.suppress(OSError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float("inf")  # gone meanwhile


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# Moments at which to kill


def rows(directory: Path, since: float = 0.0) -> list[dict[str, float]]:
    """The complete lines of a run's metrics.jsonl that were written at or after `since` (seconds of time.time())."""
    try:
        lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [row for row in map(json.loads, lines) if row["time"] >= since]


Moment = Callable[[Path, float], bool]
"""(run directory, when this launch started) -> whether to kill the launch now"""


def after(seconds: float) -> Moment:
    """`seconds` after the launch has started."""
    return lambda directory, since: time.time() >= since + seconds


def before_the_first_step(seconds: float) -> Moment:
    """`seconds` after the launch has started, if it has not logged a step yet."""
    return lambda directory, since: time.time() >= since + seconds and not rows(directory, since)


def reached(step: int) -> Moment:
    """Once this launch has logged `step`."""
    return lambda directory, since: any(row["step"] >= step for row in rows(directory, since))


def inside_the_copy(directory: Path, since: float) -> bool:
    """While rank 0 copies a state to be saved; needs `marked_run.py` with the mark COPYING."""
    try:
        return (directory / COPYING).stat().st_mtime >= since
    except FileNotFoundError:
        return False


def between_commit_and_links(directory: Path, since: float) -> bool:
    """While the newest checkpoint is committed and the best, but the link `best_model` does not point to it yet."""
    folder = directory / "checkpoints"
    with contextlib.suppress(OSError, ValueError):  # not there yet, or gone meanwhile
        steps = [entry for entry in os.scandir(folder) if re.search(r"^[^.].*_\d+$", entry.name) and not entry.is_symlink()]
        newest = max(steps, key=lambda entry: int(entry.name.rpartition("_")[2]))
        link = folder / "best_model"
        if newest.stat().st_mtime >= since and not (link.is_symlink() and os.readlink(link) == newest.name):
            state = json.loads(Path(newest.path, "trainer_state.json").read_text())["train_state"]
            return state["best_step"] == state["step"]
    return False


def inside_a_save(directory: Path, since: float) -> bool:
    """While a checkpoint is written: from the creation of its temporary folder until that is renamed."""
    try:
        entries = list(os.scandir(directory / "checkpoints"))
        names = (e for e in entries if e.name.startswith(".unfinished-") and not e.name.endswith(".link"))
        return any(e.stat(follow_symlinks=False).st_ctime >= since for e in names)
    except FileNotFoundError:  # not there yet, or renamed meanwhile
        return False


def inside_an_evaluation(every: int) -> Moment:
    """While a step divisible by `every` is evaluated: its training loss has been logged, its evaluation has not."""

    def inside(directory: Path, since: float) -> bool:
        last = next(reversed(rows(directory, since)), {"step": 1})
        return "train/loss" in last and last["step"] % every == 0

    return inside


def both(first: Moment, second: Moment) -> Moment:
    """When both conditions hold."""
    return lambda directory, since: first(directory, since) and second(directory, since)


def kill_at_moment(process: Started, directory: Path, moment: Moment, seconds: float, rank: int | None = None) -> bool:
    """SIGKILL the family, or only `rank`, at `moment`. Returns False if the command ended by itself before.

    All processes are suspended first and the condition is checked again, so that no kill falls outside the moment. Raises
    TimeoutError, after killing all, if neither the moment nor the end of the command comes within `seconds`.
    """
    end = time.monotonic() + seconds
    family, known_until = [process.pid], 0.0
    while process.poll() is None:
        if time.monotonic() > known_until:  # not each time: the search takes longer than some moments last
            family, known_until = process.family(), time.monotonic() + FAMILY_SECONDS
        if time.monotonic() > end:
            process.kill_all()
            raise TimeoutError(f"hung: {process.log.read_text(errors='replace')[-3000:]}")
        if moment(directory, process.since):
            send(family, signal.SIGSTOP)
            family = process.family()
            send(family, signal.SIGSTOP)
            one = None if rank is None else process.rank(rank)
            targets = [*family, *process.family()] if rank is None else [one] if one is not None else []
            still_there = bool(targets) and moment(directory, process.since)
            send(targets if still_there else [], signal.SIGKILL)
            send(family, signal.SIGCONT)
            if still_there:
                return True
        time.sleep(POLL_SECONDS)
    return False


# Comparison of runs


def different_tensors(checkpoint: Path, expected: Path) -> list[str]:
    """Names of tensors that differ between two unsharded checkpoints, or are in one of them only."""
    different = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(checkpoint / file, "pt") as ours, safe_open(expected / file, "pt") as theirs:
            names = set(ours.keys()), set(theirs.keys())
            different += sorted(names[0] ^ names[1])
            different += [n for n in sorted(names[0] & names[1]) if not ours.get_tensor(n).equal(theirs.get_tensor(n))]
    return different


def curve(directory: Path) -> dict[str, dict[float, float]]:
    """{metric: {step: value}} of training loss, gradient norm and evaluations. ValueError for a step that is logged twice."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows(directory):
        for name, value in row.items():
            if name in ("train/loss", "train/grad_norm") or name.startswith("eval/"):
                if row["step"] in curves.setdefault(name, {}):
                    raise ValueError(f"{name} of step {row['step']} is there twice")
                curves[name][row["step"]] = value
    return curves


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))
