"""Many commands, one at a time on each device: job i runs on queue i mod N, each queue in order, and no job's failure is another's.

A job is any command that keeps its state in a directory of its own and leaves when it is sent SIGTERM; a training run does both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.console import format_duration
from trainer.errors import INTERRUPTED, Refusal
from trainer.stopping import SIGNALS, die_with_parent

POLL_SECONDS = 0.1
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "CROSS_", "PET_")
State = Literal["done", "stopped", "failed", "not started"]


@dataclass(frozen=True)
class Job:
    """A command and the directory it works in; its output is appended to `job.log` there."""

    name: str
    command: Sequence[str]
    directory: Path
    done: Callable[[], bool]
    """whether nothing is left to do: asked before the start, and again after an exit with 0"""


def environments(parallel: bool, count: int | None, gpus: int, environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """What to set in the environment of each queue's jobs: its GPU of the `gpus` there are; without any, its share of the cores.

    Without `parallel` there is one queue; with it `count` of them (None: one for each GPU, or a single one without GPUs).
    Refusal for a count that cannot be met.
    """
    cores = len(os.sched_getaffinity(0))
    if count is not None and not parallel:
        raise Refusal(f"gpus {count} needs --parallel; without it jobs run one after the other")
    if count is not None and not 1 <= count <= (gpus or cores):
        here = f"{gpus} GPUs here" if gpus else f"no GPU here, and {cores} CPU cores to run a process on each"
        raise Refusal(f"gpus {count}: there is {here}; give a number from 1 to {gpus or cores}")
    queues = (count or gpus or 1) if parallel else 1
    if gpus:
        named = environ.get("CUDA_VISIBLE_DEVICES")
        visible = named.split(",") if named else [str(index) for index in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[queue].strip()} for queue in range(queues)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // queues))} for _ in range(queues)]


def run(
    jobs: Sequence[Job],
    queues: Sequence[Mapping[str, str]],
    say: Callable[[str], None],
    ended: Callable[[Job], None] = lambda job: None,
) -> dict[str, State]:
    """Run `jobs` on `queues` (the environment of each); what became of them, by name. Use it in the main thread.

    `ended` is called for every job that is done, at once if it was done before. A signal is passed on to the running jobs as
    SIGTERM, nothing is started after it, and their end is awaited; a second Ctrl-C kills them and raises KeyboardInterrupt.
    """
    states: dict[str, State] = {job.name: "not started" for job in jobs}
    waiting = [[job for i, job in enumerate(jobs) if i % len(queues) == queue] for queue in range(len(queues))]
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    asked: list[int] = []
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    for number in SIGNALS:
        if number != signal.SIGHUP or handlers[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    told = False
    try:
        while running or (not asked and any(waiting)):
            if asked and not told:
                told = True
                say(f"{signal.Signals(asked[0]).name}: asking {len(running)} running jobs to save and leave")
                for _, process, _ in running.values():
                    with suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
            if asked.count(signal.SIGINT) > 1:
                raise KeyboardInterrupt
            for queue, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[queue]
                    states[job.name] = _outcome(job, process.returncode, told)
                    _report(job, states[job.name], process.returncode, time.monotonic() - began, say)
                    if states[job.name] == "done":
                        ended(job)
            for queue, environment in enumerate(queues):
                while queue not in running and waiting[queue] and not asked:
                    job = waiting[queue].pop(0)
                    if job.done():
                        states[job.name] = "done"
                        say(f"{job.name}: done before")
                        ended(job)
                    else:
                        where = ", ".join(f"{key}={value}" for key, value in environment.items())
                        say(f"{job.name}: started ({where})")
                        running[queue] = (job, _start(job, environment), time.monotonic())
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for _, process, _ in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    return states


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.directory.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

    def in_child() -> None:
        die_with_parent(signal.SIGTERM)  # a killed driver must not leave jobs behind that hold the directories
        if os.getppid() != parent:
            os._exit(INTERRUPTED)

    with (job.directory / "job.log").open("ab") as log:
        # A session of its own: the terminal's Ctrl-C reaches the driver alone, which passes on one signal, not two.
        return subprocess.Popen(
            list(job.command),
            env={**without_launcher(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509 - the driver has no threads that hold locks
        )


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what torchrun or `accelerate launch` has put into it: a job is a launch of its own."""
    kept = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
    return {name: value for name, value in environ.items() if name in kept or not name.startswith(_LAUNCHERS)}


def _outcome(job: Job, code: int, told: bool) -> State:
    if code == 0 and job.done():
        return "done"
    return "stopped" if code == 0 or told else "failed"


def _report(job: Job, state: State, code: int, seconds: float, say: Callable[[str], None]) -> None:
    after = format_duration(seconds)
    if state != "failed":
        say(f"{job.name}: {state} after {after}")
        return
    log = job.directory / "job.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    say(f"{job.name}: FAILED after {after} with exit code {code}: {why} (all of its output: {log})")


def summary(states: Mapping[str, Any]) -> str | None:
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
