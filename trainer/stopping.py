"""Stop, and why? One object per rank gathers every wish to stop; all ranks sum their votes and leave together."""

import ctypes
import math
import multiprocessing
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from trainer.errors import INTERRUPTED, Refusal
from trainer.run_directory import RunDirectory

# In order of priority. SIGTERM is the last signal: a launcher that another signal killed shows up here as a SIGTERM.
REASONS: tuple[str, ...] = ("time_limit", "SIGINT", "SIGUSR1", "SIGHUP", "SIGTERM", "stop_file", "stop_typed")
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)
POLL_SECONDS = 0.5  # files and stdin are looked at this often: a network file system is slow
EXIT_SECONDS = 3.5  # from the end of the last save to the end of the process, on a machine that is busy with others


def launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, `accelerate launch` or DeepSpeed's launcher started us."""
    # Set by launchers only; people export ACCELERATE_MIXED_PRECISION and the like for plain `python`.
    return not environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE", "CROSS_RANK"))


def process_start_monotonic() -> float:
    """When this process started, in seconds of time.monotonic(), so that a time limit counts the imports.

    It is now where the kernel does not say (macOS), or says more than ten minutes ago: then the process had an earlier
    life (`prepare_data; exec python train.py`, a notebook), and the launch begins here.
    """
    now = time.monotonic()
    with suppress(OSError, AttributeError, ValueError, IndexError):
        # Under a launcher the clock runs from its start: it leaves after us, and is what the user waits for.
        pids = ("self", os.getppid()) if launched(os.environ) else ("self",)
        uptime, ticks = time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
        ages = [uptime - int(_stat_fields(pid)[19]) / ticks for pid in pids]
        return now - max((age for age in ages if 0 <= age <= 600), default=0.0)
    return now


def _stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on: the second, a name, may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


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


def die_with_parent(number: int) -> None:
    """Have the kernel send us `number` when the thread that started us ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # 1: PR_SET_PDEATHSIG


def die_with_launcher() -> None:
    """Under a launcher, turn its death into a SIGTERM for us: killed, it would leave us running unseen. Call it first.

    Nothing under plain `python`: there, `python train.py &` must outlive its shell.
    """
    if launched(os.environ):
        parent = os.getppid()
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parent:  # it died just before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def _listen(heard: Callable[[int], None]) -> Callable[[], None]:
    """Have a thread call `heard(number)` at once for each signal that has a Python handler. Gives the way back.

    The handlers themselves wait for the current C call: a whole backward, or for ever in a hung collective.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := ours.recv(1)[0]:
            heard(number)

    def stop() -> None:
        signal.set_wakeup_fd(previous)
        theirs.send(b"\0")
        thread.join()
        ours.close()
        theirs.close()

    thread = threading.Thread(target=listen, name="interrupts", daemon=True)
    thread.start()
    return stop


@contextmanager
def leaving_at_signals() -> Iterator[None]:
    """Where no StopRequests holds, nothing is begun yet, or all is saved: a signal ends the process, with one line.

    A SIGINT stays Python's KeyboardInterrupt.
    """

    def leave(number: int) -> None:
        if number in deadly:
            os.write(2, f"{signal.Signals(number).name}: leaving at once; nothing is lost\n".encode())
            os._exit(INTERRUPTED)

    deadly = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    stop = _listen(leave)
    for number in deadly:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        stop()
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def reset_in_worker(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a worker hears no signal but its trainer's own, and ends with its trainer.

    Signals reach whole process groups and Slurm steps, and a trainer without workers cannot save in peace. (Its own
    SIGTERM is DataLoader's clean-up; deaf to that, a worker would hang the interpreter's exit.) Make the loader's
    iterator in the main thread: the kernel ends a worker with the *thread* that started it.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "reset_in_worker belongs in a worker process"
    signal.set_wakeup_fd(-1)  # inherited by fork: our signals are not the trainer's
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere (macOS) torch's handler stays: any SIGTERM ends the worker
        # Ignored as well: the mask is this thread's alone, and a library may have started others at the fork.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_sigterm_of, args=(trainer.pid,), daemon=True).start()
    die_with_parent(signal.SIGKILL)
    if not trainer.is_alive():  # it died just before we asked
        os._exit(1)


def _obey_sigterm_of(pid: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
    os._exit(0)  # any other status, and the trainer's DataLoader reports a crashed worker


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
        self._stop_listening = _listen(self._leave_at_second_interrupt)

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
        _, _, group, _, terminal, foreground = _stat_fields(os.getppid())[:6]
        return launched(os.environ) and group == foreground and int(terminal) == os.fstat(0).st_rdev
    return False
