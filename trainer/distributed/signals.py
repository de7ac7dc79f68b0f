"""Processes and the signals between them: a launcher and its trainer, a trainer and its workers, a driver and its jobs."""

import atexit
import ctypes
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from trainer.errors import INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)
LEAVE_SECONDS = 2.0  # for what runs at the end of the process; it takes a hundredth of that


failing = threading.Event()
"""set where this process ends by itself, with an exit code of its own: the launcher, which then signals all, changes nothing"""


terminating = threading.Event()
"""set once this process has had a SIGTERM that it treats as a request"""


def launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, `accelerate launch` or DeepSpeed's launcher started us."""
    # Set by launchers only (the last by DeepSpeed's); people export ACCELERATE_MIXED_PRECISION and the like for plain `python`.
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
        ages = [uptime - int(stat_fields(pid)[19]) / ticks for pid in pids]
        return now - max((age for age in ages if 0 <= age <= 600), default=0.0)
    return now


def stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on: the second, a name, may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


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
        if os.getppid() != parent:  # it died just before that call
            os.kill(os.getpid(), signal.SIGTERM)
        elif "CROSS_RANK" in os.environ:
            _die_with_deepspeed(parent)


def _die_with_deepspeed(launcher: int) -> None:
    """On one host the `deepspeed` that people start is the parent of our launcher, which outlives it."""
    with suppress(OSError, AttributeError):
        starter = int(stat_fields(launcher)[1])
        words = Path(f"/proc/{starter}/cmdline").read_bytes().split(b"\0")
        if not any(word.rpartition(b"/")[2] in (b"deepspeed", b"ds") for word in words[:2]):
            return  # a shell, which may end before us
        end = os.pidfd_open(starter)

        def wait() -> None:
            select.select([end], [], [])
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, name="deepspeed", daemon=True).start()


def end_launcher() -> None:
    """Have torchrun end instead of starting us again: no restart mends what we end with. Called on every process."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}") or 0) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if count < most and os.environ.get("LOCAL_RANK") == "0":
        failing.set()
        os.kill(os.getppid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """End the process with this status, from any thread, and at once.

    The interpreter's own end takes a second of the processor, waits for threads, and gloo's now and then abort it. What is
    registered for the end of the process (`atexit`) runs all the same; a stdout that is full does not keep us.
    """

    def finish() -> None:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()

    finishing = threading.Thread(target=finish, daemon=True)
    finishing.start()
    finishing.join(LEAVE_SECONDS)
    os._exit(code)


def writable(descriptor: int, seconds: float = 0.0) -> bool:
    """Whether, within so many seconds, a write of at most select.PIPE_BUF bytes would not wait.

    It would where nobody reads a pipe that is full, or a terminal was stopped with Ctrl-S.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))


def say(line: str) -> None:
    """Print a line on stderr, past Python's streams and without waiting for a reader: for a process that has to leave."""
    with suppress(OSError):
        if writable(2):
            os.write(2, line.encode())


def free_full_streams() -> None:
    """In a signal handler: a print that waits for a reader goes on to nowhere, or the signal would not be obeyed."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if not writable(descriptor, 1.0):
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


def processor_seconds() -> tuple[float, float]:
    """(how long the main thread has run, how long it has waited for a core that others had). Zeros where it is not known."""
    with suppress(OSError, ValueError):
        ran, waited, _ = Path("/proc/self/schedstat").read_text().split()
        return int(ran) / 1e9, int(waited) / 1e9
    return 0.0, 0.0


def listen_to_signals(on_signal: Callable[[int], None]) -> Callable[[], None]:
    """Have a thread call `on_signal(number)` at once for each signal that has a Python handler. Returns what undoes it.

    The handlers themselves wait for the current C call: a whole backward, or for ever in a hung collective.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := ours.recv(1)[0]:
            on_signal(number)

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
        if number in deadly and not failing.is_set():
            say(f"{signal.Signals(number).name}: leaving at once; nothing is lost\n")
            os._exit(INTERRUPTED)

    deadly = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    stop = listen_to_signals(leave)
    for number in deadly:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        stop()
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def reset_in_worker(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a worker reacts to no signal but its trainer's own, and ends with its trainer.

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
    if not trainer.is_alive():  # it died just before that call
        os._exit(1)


def _obey_sigterm_of(pid: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
    os._exit(0)  # any other status, and the trainer's DataLoader reports a crashed worker
