"""Many commands, one at a time on each device: job i runs on queue i mod N, each queue in order, failures stay their own.

A job is any command that keeps its state in a directory of its own and leaves when it gets SIGTERM; a training run does both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.console import format_duration
from trainer.errors import INTERRUPTED, Refusal
from trainer.hardware import cores
from trainer.signals import SIGNALS, die_with_parent, launched

POLL_SECONDS = 0.1
LOG = "job.log"
# What launchers set; anything else that begins so (LOCAL_SCRATCH) is the user's.
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
_RANKS = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"}
_RANKS |= {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"}
# How a job leaves that was told to: in peace, by the signal, or (under a shell) by its number; or before it listened.
_TOLD = {0, -signal.SIGTERM, 128 + signal.SIGTERM, INTERRUPTED}
State = Literal["done", "stopped", "failed", "not started"]


@dataclass(frozen=True)
class Job:
    """A command and the directory it works in; its output is appended to `job.log` there."""

    name: str
    command: Sequence[str]
    directory: Path
    done: Callable[[], bool]
    """whether nothing is left to do: asked before the start, and again after an exit with 0"""


def environments(
    parallel: bool, count: int | None, gpus: int, jobs: int, environ: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """What to set in the environment of each queue's jobs: its GPU of the `gpus` there are; without any, a share of the cores.

    Without `parallel` there is one queue; with it `count` of them (None: one for each GPU, or without GPUs for each core, as
    far as there are jobs). Refusal for a count that cannot be met.
    """
    if count is not None and not parallel:
        raise Refusal(f"gpus {count} needs --parallel; without it jobs run one after the other")
    if count is not None and (count < 1 or (gpus and count > gpus)):
        there = f"there {'are' if gpus > 1 else 'is'} {gpus} GPU{'s' * (gpus > 1)} here; give a number from 1 to {gpus}"
        raise Refusal(f"gpus {count}: {there if gpus else 'no GPU here, so N processes share the cores; give at least 1'}")
    queues = (count or gpus or min(cores(), jobs)) if parallel else 1
    if gpus:
        named = environ.get("CUDA_VISIBLE_DEVICES")
        visible = named.split(",") if named else [str(index) for index in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[queue].strip()} for queue in range(queues)]
    chosen = environ.get("OMP_NUM_THREADS") if not launched(environ) else None  # a launcher's choice is for its own processes
    return [{"OMP_NUM_THREADS": chosen or str(max(1, cores() // queues))} for _ in range(queues)]


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    began: float
    log_start: int
    """where the output of this start begins in the job's log"""


def run(
    jobs: Sequence[Job],
    queues: Sequence[Mapping[str, str]],
    say: Callable[[str], None],
    ended: Callable[[Job], None] = lambda job: None,
) -> dict[str, State]:
    """Run `jobs` on `queues` (the environment of each); what became of them, by name. Use it in the main thread.

    `ended` is called for every job that is done, at once if it was done before. A signal is passed on to the running jobs as
    SIGTERM, nothing is started after it, and their end is awaited; a second Ctrl-C kills them and raises Refusal (exit 130).
    """
    states: dict[str, State] = {job.name: "not started" for job in jobs}
    waiting = [[job for i, job in enumerate(jobs) if i % len(queues) == queue] for queue in range(len(queues))]
    running: dict[int, _Running] = {}
    told = False

    def settle(job: Job, state: State, words: str) -> None:
        states[job.name] = state
        say(f"{job.name}: {words}")
        if state == "done":
            ended(job)

    with _signals() as asked:
        try:
            while running or (any(waiting) and not asked):
                if asked and not told:
                    told = True
                    say(f"{signal.Signals(asked[0]).name}: asking {len(running)} running jobs to save and leave")
                    for at_work in running.values():
                        at_work.process.terminate()
                if asked.count(signal.SIGINT) > 1:
                    raise Refusal("interrupted twice: the running jobs are killed; what they have saved is kept", INTERRUPTED)
                for queue, at_work in list(running.items()):
                    if at_work.process.poll() is not None:
                        del running[queue]
                        settle(at_work.job, *_outcome(at_work, told))
                for queue, environment in enumerate(queues):
                    while queue not in running and waiting[queue] and not asked:
                        job = waiting[queue].pop(0)
                        if job.done():
                            settle(job, "done", "done before")
                            continue
                        try:
                            running[queue] = _start(job, environment)
                            say(f"{job.name}: started ({', '.join(f'{k}={v}' for k, v in environment.items())})")
                        except OSError as error:
                            settle(job, "failed", f"FAILED to start: {error}")
                time.sleep(POLL_SECONDS if running else 0)
        finally:
            for at_work in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(at_work.process.pid, signal.SIGKILL)  # its data workers too
                at_work.process.wait()
    return states


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop. A SIGHUP that is ignored already (nohup) stays ignored."""
    asked: list[int] = []
    listener = signal.set_wakeup_fd(-1)  # main's, which leaves at once: the jobs come first
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(listener)


def _start(job: Job, environment: Mapping[str, str]) -> _Running:
    job.directory.mkdir(parents=True, exist_ok=True)
    driver = os.getpid()

    def in_child() -> None:
        die_with_parent(signal.SIGTERM)  # a killed driver must not leave jobs behind that hold the directories
        if os.getppid() != driver:
            os._exit(INTERRUPTED)

    with (job.directory / LOG).open("ab") as log:
        log_start = log.tell()
        # A session of its own: the terminal's Ctrl-C reaches the driver alone, which passes on one signal, not two.
        process = subprocess.Popen(
            list(job.command),
            env={**without_launcher(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,
        )
        return _Running(job, process, time.monotonic(), log_start)


def _outcome(ended: _Running, told: bool) -> tuple[State, str]:
    """What became of a job that has ended, and in words; `told`: it had been asked to stop."""
    code, after = ended.process.returncode, f"after {format_duration(time.monotonic() - ended.began)}"
    if code == 0 and ended.job.done():
        return "done", f"done {after}"
    if code == 0 or (told and code in _TOLD):
        return "stopped", f"stopped {after}"
    log = ended.job.directory / LOG
    with log.open("rb") as file:
        file.seek(ended.log_start)
        output = file.read().decode(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return "failed", f"FAILED {after} with exit code {code}: {why} (all of its output: {log})"


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what torchrun or `accelerate launch` has put into it: a job is a launch of its own."""
    kept = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
    dropped = {name for name in environ if name in _RANKS or name.startswith(_LAUNCHERS)} - set(kept)
    return {name: value for name, value in environ.items() if name not in dropped}


def summary(states: Mapping[str, State]) -> str | None:
    """One line about the jobs that are not done; None if all are."""
    left = {name: state for name, state in states.items() if state != "done"}
    if not left:
        return None
    kinds = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind in ("failed", "stopped", "not started")
        if (names := [name for name, state in left.items() if state == kind])
    ]
    return f"{len(left)} of {len(states)} jobs are not done: {'; '.join(kinds)}"
