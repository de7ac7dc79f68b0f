"""Many commands, one at a time on each device: job i runs in queue i mod N. A failed job does not stop the others.

A job is any command that keeps its state in a directory of its own and exits on SIGTERM; a training run does both.
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

from trainer.distributed.hardware import cores
from trainer.distributed.signals import SIGNALS, die_with_parent, launched
from trainer.errors import INTERRUPTED, UserError
from trainer.reporting.console import format_duration

POLL_SECONDS = 0.1
LOG_FILE = "job.log"
# Variables that launchers set. Others with such a prefix (LOCAL_SCRATCH) are the user's.
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
LAUNCHER_VARIABLES = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
}
# Exit codes of a job that stops on SIGTERM: by itself, by the signal (directly or under a shell), or before it handles it.
STOPPED_CODES = {0, -signal.SIGTERM, 128 + signal.SIGTERM, INTERRUPTED}
State = Literal["done", "stopped", "failed", "not started"]


@dataclass(frozen=True)
class Job:
    """A command and the directory it works in; its output is appended to `job.log` there."""

    name: str
    command: Sequence[str]
    directory: Path
    done: Callable[[], bool]
    """whether nothing is left to do; called before the start and after an exit with 0"""


def environments(
    parallel: bool, gpus: int | None, available_gpus: int, jobs: int, environ: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """The environment variables of each queue, which give it one of the `available_gpus`, or without GPUs a share of the cores.

    Without `parallel` there is one queue; with it there are `gpus` (None: one for each available GPU, or without GPUs one for
    each core, but no more than jobs). UserError for a number of `gpus` that is not available.
    """
    if gpus is not None and not parallel:
        raise UserError(f"gpus {gpus} needs --parallel; without it jobs run one after the other")
    if gpus is not None and not available_gpus and gpus < 1:
        raise UserError(f"gpus {gpus}: no GPU here, so N processes share the cores; give at least 1")
    if gpus is not None and available_gpus and not 1 <= gpus <= available_gpus:
        available = "there is 1 GPU" if available_gpus == 1 else f"there are {available_gpus} GPUs"
        raise UserError(f"gpus {gpus}: {available} here; give a number from 1 to {available_gpus}")
    queues = (gpus or available_gpus or min(cores(), jobs)) if parallel else 1
    if available_gpus:
        visible_devices = environ.get("CUDA_VISIBLE_DEVICES")
        visible = visible_devices.split(",") if visible_devices else [str(index) for index in range(available_gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[queue].strip()} for queue in range(queues)]
    threads = None if launched(environ) else environ.get("OMP_NUM_THREADS")  # a launcher's value is for its own processes
    return [{"OMP_NUM_THREADS": threads or str(max(1, cores() // queues))} for _ in range(queues)]


class RunningJob(NamedTuple):
    """A job and its process."""

    job: Job
    process: subprocess.Popen[bytes]
    started: float
    log_offset: int
    """where the output of this process begins in the job's log"""


def run(
    jobs: Sequence[Job],
    queues: Sequence[Mapping[str, str]],
    log: Callable[[str], None],
    on_done: Callable[[Job], None] = lambda job: None,
) -> dict[str, State]:
    """Run `jobs` in `queues` (the environment of each). Returns {job: its final state}. Call it in the main thread.

    `on_done` is called for every job that is done, at once if it was done before. A signal is passed on to the running jobs as
    SIGTERM, nothing is started after it, and their end is awaited; a second Ctrl-C kills them and raises UserError (exit 130).
    """
    states: dict[str, State] = {job.name: "not started" for job in jobs}
    waiting = [[job for i, job in enumerate(jobs) if i % len(queues) == queue] for queue in range(len(queues))]
    running: dict[int, RunningJob] = {}
    stopping = False

    def finish(job: Job, state: State, text: str) -> None:
        states[job.name] = state
        log(f"{job.name}: {text}")
        if state == "done":
            on_done(job)

    with _collect_signals() as signals:
        try:
            while running or (any(waiting) and not signals):
                if signals and not stopping:
                    stopping = True
                    log(f"{signal.Signals(signals[0]).name}: asking {len(running)} running jobs to save and leave")
                    for current in running.values():
                        current.process.terminate()
                if signals.count(signal.SIGINT) > 1:
                    raise UserError("interrupted twice: the running jobs are killed; what they have saved is kept", INTERRUPTED)
                for queue, current in list(running.items()):
                    if current.process.poll() is not None:
                        del running[queue]
                        finish(current.job, *_outcome(current, stopping))
                for queue, environment in enumerate(queues):
                    while queue not in running and waiting[queue] and not signals:
                        job = waiting[queue].pop(0)
                        if job.done():
                            finish(job, "done", "done before")
                            continue
                        try:
                            running[queue] = _start(job, environment)
                            log(f"{job.name}: started ({', '.join(f'{k}={v}' for k, v in environment.items())})")
                        except OSError as error:
                            finish(job, "failed", f"FAILED to start: {error}")
                time.sleep(POLL_SECONDS if running else 0)
        finally:
            for current in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(current.process.pid, signal.SIGKILL)  # its data workers too
                current.process.wait()
    return states


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """A list to which every stop signal is appended. A SIGHUP that is ignored already (nohup) stays ignored."""
    received: list[int] = []
    wakeup_fd = signal.set_wakeup_fd(-1)  # `main` watches it and would exit at once, before the jobs are stopped
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if handlers[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup_fd)


def _start(job: Job, environment: Mapping[str, str]) -> RunningJob:
    job.directory.mkdir(parents=True, exist_ok=True)
    driver = os.getpid()

    def in_child() -> None:
        die_with_parent(signal.SIGTERM)  # jobs that outlive a killed driver would hold their directories
        if os.getppid() != driver:
            os._exit(INTERRUPTED)

    with (job.directory / LOG_FILE).open("ab") as log:
        log_offset = log.tell()
        # In a session of its own: Ctrl-C in the terminal reaches the driver alone, which passes on one signal, not two.
        process = subprocess.Popen(
            list(job.command),
            env={**without_launcher(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,
        )
        return RunningJob(job, process, time.monotonic(), log_offset)


def _outcome(ended: RunningJob, stopping: bool) -> tuple[State, str]:
    """The state of a job whose process has ended, and a text for the log; `stopping`: it had been sent SIGTERM."""
    code, after = ended.process.returncode, f"after {format_duration(time.monotonic() - ended.started)}"
    if code == 0 and ended.job.done():
        return "done", f"done {after}"
    if code == 0 or (stopping and code in STOPPED_CODES):
        return "stopped", f"stopped {after}"
    log = ended.job.directory / LOG_FILE
    with log.open("rb") as file:
        file.seek(ended.log_offset)
        output = file.read().decode(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return "failed", f"FAILED {after} with exit code {code}: {reason} (all of its output: {log})"


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables of torchrun or `accelerate launch`: a job is a launch of its own."""
    kept = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")

    def is_launchers(name: str) -> bool:
        return name not in kept and (name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES))

    return {name: value for name, value in environ.items() if not is_launchers(name)}


def summary(states: Mapping[str, State]) -> str | None:
    """One line about the jobs that are not done; None if all are."""
    not_done = sum(state != "done" for state in states.values())
    if not_done == 0:
        return None
    groups = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind in ("failed", "stopped", "not started")
        if (names := [name for name, state in states.items() if state == kind])
    ]
    return f"{not_done} of {len(states)} jobs are not done: {'; '.join(groups)}"
