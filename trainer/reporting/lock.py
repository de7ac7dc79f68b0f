"""The lock that keeps two runs out of one directory."""

import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from trainer.errors import CHECKPOINT, UserError

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # a holder on another machine is dead after this long without a heartbeat
WATCH_SECONDS = 0.5  # between looks for a heartbeat


def now_iso() -> str:
    """The local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


class Lock:
    """Keeps a second run out of a directory, by a file `.lock` in it.

    On one machine the kernel decides: forked DataLoader workers do not inherit a POSIX record lock, and it ends with its
    process, however that ends. Between machines, whose file system may not share locks, a heartbeat in the file decides.
    A process loses its POSIX lock when it closes *any* descriptor of the file, so it opens it only once.
    """

    NAME: ClassVar[str] = ".lock"
    _held: ClassVar[set[str]] = set()  # real paths: the kernel grants a process its own lock again

    def __init__(self, directory: Path, log: Callable[[str], None] = print) -> None:
        self.path = directory / self.NAME
        self._log = log
        self._descriptor = -1
        self._writing = threading.Lock()
        self._released = threading.Event()
        self._content: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the lock and start the heartbeat. UserError: exit code 2 if another holds it, 5 if the file cannot be used."""
        # Before the file is opened: to close a second descriptor would drop the lock.
        if os.path.realpath(self.path) in Lock._held:
            raise self._in_use({"host": socket.gethostname(), "pid": os.getpid()})
        with ExitStack() as undo:
            descriptor = self._open()
            undo.callback(os.close, descriptor)
            kernel, holder = _record_lock(descriptor), _read_holder(descriptor)
            if kernel == "held" or (_may_live(holder, kernel) and self._lives(descriptor, holder)):
                raise self._in_use(_read_holder(descriptor))
            if os.fstat(descriptor).st_nlink == 0:  # another start, which was refused, has removed the file
                raise self._unusable("removed in this moment; try again")
            if holder:
                self._log(f"taking over {self.path.parent} from {_name(holder)}, which ended without releasing it")
            self._content = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
            self._content |= {"job_id": os.environ.get("SLURM_JOB_ID"), "started": now_iso()}
            try:
                self._write(descriptor)
            except OSError as error:
                raise self._unusable(error.strerror) from None
            undo.pop_all()
        self._descriptor = descriptor
        Lock._held.add(os.path.realpath(self.path))
        self._released.clear()
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()

    def _lives(self, descriptor: int, holder: dict[str, Any]) -> bool:
        """Whether a holder on another machine is alive: waits for its heartbeat, until it has been silent for STALE_SECONDS.

        The time in the file proves nothing: the machine may have died since then, and its clock may be wrong.
        """
        seconds = STALE_SECONDS - max(0.0, time.time() - holder["heartbeat"])
        self._log(f"Waiting, {seconds:.0f} s at most, for a sign of life of {_name(holder)}, which holds {self.path.parent}")
        end = time.monotonic() + seconds
        while (now := _read_holder(descriptor)) == holder and time.monotonic() < end:
            time.sleep(WATCH_SECONDS)
        return bool(now) and now != holder

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Empty the file and give up the lock, if it is held. The file stays: removing it could let two runs in."""
        self._released.set()
        with self._writing:
            if self._descriptor < 0:
                return
            Lock._held.discard(os.path.realpath(self.path))
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise self._unusable(error.strerror) from None  # a link: "Too many levels of symbolic links"
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # a hard link's other name is some other file
            os.close(descriptor)
            raise self._unusable("not an ordinary file of its own")
        return descriptor

    def _unusable(self, why: str | None) -> UserError:
        return UserError(f"cannot use the lock {self.path}: {why}; mend that, or choose another directory", CHECKPOINT)

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        way_out = "stop that run, or give this one another directory (--run_name, --output_dir, --checkpoint_dir)"
        return UserError(f"{self.path.parent} is in use by {_name(holder)}; {way_out}")

    def _write(self, descriptor: int) -> None:
        content = json.dumps({**self._content, "heartbeat": int(time.time())}).encode() + b"\n"
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)  # other machines see only what has reached the file server

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with self._writing, suppress(OSError):  # a full disk must not end the run
                if self._descriptor >= 0:
                    self._write(self._descriptor)


def was_killed(directory: Path) -> bool:
    """Whether the run that held a directory ended without releasing it. Call it in a process that does not hold the lock, which
    closing the file would drop."""
    try:
        with open(directory / Lock.NAME, "rb") as file:
            kernel, holder = _record_lock(file.fileno(), fcntl.LOCK_SH), _read_holder(file.fileno())
            return kernel != "held" and bool(holder) and not _may_live(holder, kernel)
    except OSError:  # no such file, or no permission
        return False


def _record_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> Literal["ours", "held", "unsupported"]:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno in (errno.EACCES, errno.EAGAIN) else "unsupported"
    return "ours"


def _read_holder(descriptor: int) -> dict[str, Any]:
    """What the lock file says; empty if released or unreadable."""
    try:
        holder, _ = json.JSONDecoder().raw_decode(os.pread(descriptor, 4096, 0).decode())
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("heartbeat"), int) else {}


def _may_live(holder: dict[str, Any], kernel: str) -> bool:
    """Whether a holder may still be running although the kernel does not report its lock (`kernel`: see `_record_lock`)."""
    if not holder or (kernel == "ours" and holder.get("machine") == _machine()):
        return False
    return time.time() - holder["heartbeat"] < STALE_SECONDS


def _machine() -> str:
    """An id of the running kernel: containers on one machine have different host names, but share locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    since = f", started {holder['started']}" if "started" in holder else ""
    seen = f", last seen {max(0, int(time.time()) - holder['heartbeat'])} s ago" if "heartbeat" in holder else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}{since}{seen}"
