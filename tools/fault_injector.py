"""Real launches with real faults: starts the command a user types, and kills it at a moment that can be seen from outside.

Used by tools/torture.py and by the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
MARK = "SAMECURVE_STARTED_AS"
LOOK_SECONDS = 0.0002  # a save of a tiny model takes a few milliseconds


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(kind: str, script: Path, *arguments: str) -> list[str]:
    """`python` for "one", else `accelerate launch` with accelerate_configs/{kind}.yaml on two processes."""
    if kind == "one":
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", f"accelerate_configs/{kind}.yaml", "--num_processes", "2"]
    return [*launcher, *options, "--main_process_port", str(free_port()), str(script), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher around it may have set.

    One thread each: tiny steps spend their time waiting for a second thread that another process keeps from running.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "PET_", "WANDB_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **extra}


class Started(subprocess.Popen[bytes]):
    """A command under way in a session of its own, and its family: all that carry its mark in their environment.

    Launchers give each rank a session of its own, and data workers come from a server process: neither the process group
    nor the command line finds them all.
    """

    def __init__(self, words: Sequence[str], log: Path, env: Mapping[str, str] | None = None, **options: object) -> None:
        self.mark, self.since, self.log = uuid.uuid4().hex, time.time(), log
        marked = {**(environment() if env is None else env), MARK: self.mark}
        options.setdefault("stdin", subprocess.DEVNULL)
        with log.open("ab") as out:
            super().__init__(  # type: ignore[call-overload]
                list(words), cwd=ROOT, env=marked, stdout=out, stderr=out, start_new_session=True, **options
            )

    def family(self) -> list[int]:
        """Living processes: launcher, ranks, data workers, and whatever else was started."""
        return [pid for pid, values in _environments() if f"{MARK}={self.mark}".encode() in values]

    def rank(self, number: int) -> int | None:
        """The process of a rank, once it is there: the oldest with that number (its data workers inherit the number)."""
        marks = {f"{MARK}={self.mark}".encode(), f"RANK={number}".encode()}
        return min((pid for pid, values in _environments() if marks <= set(values)), key=_start_ticks, default=None)

    def kill_all(self) -> None:
        """SIGKILL to the whole family."""
        send([*self.family(), *([self.pid] if self.poll() is None else [])], signal.SIGKILL)
        self.wait(timeout=30)

    def orphans(self, seconds: float) -> list[int]:
        """Who of the family is still there so long after the command has ended."""
        end = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.02)
        return left


def _environments() -> list[tuple[int, list[bytes]]]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's; a zombie has none
                found.append((int(entry), Path("/proc", entry, "environ").read_bytes().split(b"\0")))
    return found


def _start_ticks(pid: int) -> float:
    """When a process started. Not told by its number: numbers are used again."""
    with contextlib.suppress(OSError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float("inf")  # gone meanwhile


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """A signal to each that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# Moments


def rows(directory: Path, since: float = 0.0) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl, written at or after `since`."""
    try:
        lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [row for row in map(json.loads, lines) if row["time"] >= since]


Moment = Callable[[Path, float], bool]
"""(run directory, when this launch started) -> whether the launch is at the point where it is to be struck"""


def after(seconds: float) -> Moment:
    """So long after its start."""
    return lambda directory, since: time.time() >= since + seconds


def before_the_first_step(seconds: float) -> Moment:
    """So long after its start, and nothing logged yet."""
    return lambda directory, since: time.time() >= since + seconds and not rows(directory, since)


def reached(step: int) -> Moment:
    """This launch has logged `step`."""
    return lambda directory, since: any(row["step"] >= step for row in rows(directory, since))


def inside_a_save(directory: Path, since: float) -> bool:
    """Between the making of a temporary folder and its renaming."""
    try:
        entries = list(os.scandir(directory / "checkpoints"))
        names = (e for e in entries if e.name.startswith(".unfinished-") and not e.name.endswith(".link"))
        return any(e.stat(follow_symlinks=False).st_ctime >= since for e in names)
    except FileNotFoundError:  # not there yet, or renamed meanwhile
        return False


def inside_an_evaluation(every: int) -> Moment:
    """Steps divisible by `every` are evaluated: this one has been logged, and its evaluation not yet."""

    def inside(directory: Path, since: float) -> bool:
        last = next(reversed(rows(directory, since)), {"step": 1})
        return "train/loss" in last and last["step"] % every == 0

    return inside


def both(one: Moment, other: Moment) -> Moment:
    """Where both hold."""
    return lambda directory, since: one(directory, since) and other(directory, since)


def strike(process: Started, directory: Path, moment: Moment, seconds: float, rank: int | None = None) -> bool:
    """SIGKILL the family (or one rank alone) at `moment`; False if the command ended by itself before.

    At the moment all are stopped first and looked at again: so the kill falls inside it, or the command goes on. Raises
    TimeoutError where neither moment nor end has come within `seconds`; then everybody has been killed.
    """
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill_all()
            raise TimeoutError(f"hung: {process.log.read_text(errors='replace')[-3000:]}")
        if moment(directory, process.since):
            family = process.family()
            send(family, signal.SIGSTOP)
            one = None if rank is None else process.rank(rank)
            victims = [*family, *process.family()] if rank is None else [one] if one is not None else []
            strikes = bool(victims) and moment(directory, process.since)
            send(victims if strikes else [], signal.SIGKILL)
            send(family, signal.SIGCONT)
            if strikes:
                return True
        time.sleep(LOOK_SECONDS)
    return False


# What must hold afterwards


def different_tensors(checkpoint: Path, expected: Path) -> list[str]:
    """Names of the weights and moments of two checkpoints (in one file each) that are not the same bits, or not there."""
    found = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(checkpoint / file, "pt") as mine, safe_open(expected / file, "pt") as right:
            names = set(mine.keys()), set(right.keys())
            found += sorted(names[0] ^ names[1])
            found += [n for n in sorted(names[0] & names[1]) if not mine.get_tensor(n).equal(right.get_tensor(n))]
    return found


def curve(directory: Path) -> dict[str, dict[float, float]]:
    """{metric: {step: value}} of what training and evaluation give. ValueError for a step that is there twice."""
    found: dict[str, dict[float, float]] = {}
    for row in rows(directory):
        for name, value in row.items():
            if name in ("train/loss", "train/grad_norm") or name.startswith("eval/"):
                if row["step"] in found.setdefault(name, {}):
                    raise ValueError(f"{name} of step {row['step']} is there twice")
                found[name][row["step"]] = value
    return found
