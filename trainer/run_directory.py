"""The run directory: its files, how they are written, and the lock that keeps two runs out of it. Rank 0 only."""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from trainer.errors import CHECKPOINT, Refusal
from trainer.redaction import redact, redact_text

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 120.0  # a holder on another machine is dead after this long without a heartbeat
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "safetensors")


def now_iso() -> str:
    """The local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader, or a crash at any moment, sees the old file or the new one.

    Raises OSError (disk full, no permission), and then leaves the old file and no temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()  # left by a killed process that had our number
    try:
        # Mode 0666 cut by the umask, as open() gives; tempfile would make it 0600, unreadable for the group.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory last. Some network file systems cannot; what was renamed is in place anyway."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


class RunDirectory:
    """Where a run keeps its files. `checkpoint_dir` moves only the checkpoints."""

    def __init__(self, path: Path, checkpoint_dir: Path | None = None) -> None:
        self.path = path
        self.checkpoints = checkpoint_dir if checkpoint_dir is not None else path / "checkpoints"
        self.config = path / "config.yaml"
        self.command = path / "command.txt"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.status = path / "status.json"
        self.plots = path / "plots"
        self.tensorboard = path / "tensorboard"
        self.stop_file = path / "stop"  # made by the user: `touch stop`
        self.status_file = path / "status"
        self._made: list[Path] = []
        self._locks: list[Lock] = []

    def prepare(self) -> None:
        """Make the folders and write into them: a full or read-only disk shows now. Raises Refusal (exit 5)."""
        for folder in (self.path, self.checkpoints):
            try:
                missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                self._made += missing
                probe = folder / f".writable.{os.getpid()}"
                write_text_atomic(probe, "x")
                probe.unlink()
            except OSError as error:
                flag = "--output_dir" if self.path in (folder, folder.parent) else "--checkpoint_dir"
                message = f"cannot write to {folder}: {error.strerror}; mend that, or choose another with {flag}"
                raise Refusal(message, CHECKPOINT) from None

    def lock(self, say: Callable[[str], None]) -> None:
        """Keep other runs out of both folders: another run's `--checkpoint_dir` may point into this one. Raises Refusal."""
        self._locks = [Lock(self.path, say), Lock(self.checkpoints, say)]
        for lock in self._locks:
            lock.acquire()

    def release(self, used: bool = True) -> None:
        """Let others in. If nothing was written (not `used`), remove the folders that `prepare` made: a typing error
        must not leave a run behind."""
        locks = {lock.path for lock in self._locks if lock.held}
        for folder in sorted(self._made if not used else (), key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty, so somebody's
                if locks.issuperset(folder.iterdir()):
                    (folder / Lock.NAME).unlink(missing_ok=True)
                folder.rmdir()
        for lock in self._locks:
            lock.release()

    def write_status(
        self,
        state: Literal["running", "stopped", "finished", "failed"],
        reason: str | None = None,
        step: int | None = None,
        checkpoint: str | Path | None = None,
    ) -> bool:
        """Replace status.json. False where the disk refuses: a status must never hide what it reports."""
        status = {"state": state, "reason": reason and redact_text(reason), "step": step}
        status |= {"checkpoint": checkpoint and str(checkpoint), "time": now_iso()}
        status |= {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):
            write_text_atomic(self.status, json.dumps(status, indent=2) + "\n")
            return True
        return False

    def write_command(self, argv: Iterable[str]) -> None:
        """Append this launch's command line to command.txt, quoted for a shell, without secrets. Raises OSError."""
        with open(self.command, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(shlex.join(redact(argv)) + "\n")

    def write_environment(self, extra: dict[str, Any]) -> None:
        """Replace environment.json: versions, machine, commit and `extra`; no environment variables. Raises OSError."""
        facts = {"time": now_iso(), "host": socket.gethostname(), "platform": platform.platform()}
        facts |= {"cpu_count": os.cpu_count(), "git_commit": _git_commit(), "python": platform.python_version()}
        facts |= {package: _version(package) for package in PACKAGES} | extra
        write_text_atomic(self.environment, redact_text(json.dumps(facts, indent=2, default=str)) + "\n")


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git_commit() -> str | None:
    """The commit of this code, ending in `-dirty` where files were changed; None where git does not track it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=10, text=True).stdout.strip()

    try:  # an installed package may lie inside somebody else's repository: that commit says nothing about this code
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


class Lock:
    """Keeps a second run out of a directory, by a file `.lock` in it.

    On one machine the kernel decides: a POSIX record lock is not inherited by forked DataLoader workers and ends with
    its process, however that ends. Between machines, whose file system may not share locks, the heartbeat in the file
    decides. A POSIX lock is dropped when its process closes *any* descriptor of the file: it is opened once.
    """

    NAME: ClassVar[str] = ".lock"
    _held: ClassVar[set[str]] = set()  # the kernel does not keep a process out of its own lock

    def __init__(self, directory: Path, say: Callable[[str], None] = print) -> None:
        self.path = directory / self.NAME
        self._say = say
        self._descriptor = -1
        self._writing = threading.Lock()
        self._released = threading.Event()
        self._content: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the lock and start the heartbeat. Raises Refusal: exit 2 if it is held, 5 if the file is no good."""
        if os.path.realpath(self.path) in Lock._held:  # asked before opening: closing a second descriptor would drop the first
            raise self._in_use({"host": socket.gethostname(), "pid": os.getpid()})
        with ExitStack() as undo:
            descriptor = self._open()
            undo.callback(os.close, descriptor)
            kernel, holder = _record_lock(descriptor), _read_holder(descriptor)
            if kernel == "held" or _may_live(holder, kernel):
                raise self._in_use(holder)
            if os.fstat(descriptor).st_nlink == 0:  # a refused start has removed it
                raise self._unusable("removed in this moment; try again")
            if holder:
                self._say(f"taking over {self.path.parent} from {_name(holder)}, which ended without releasing it")
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

    @property
    def held(self) -> bool:
        """Whether we have it."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Empty the file and give the lock up, if held. The file stays: to remove it could let two runs in."""
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
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # a hard link would write into another's file
            os.close(descriptor)
            raise self._unusable("not an ordinary file of its own")
        return descriptor

    def _unusable(self, why: str | None) -> Refusal:
        return Refusal(f"cannot use the lock {self.path}: {why}; mend that, or choose another directory", CHECKPOINT)

    def _in_use(self, holder: dict[str, Any]) -> Refusal:
        way_out = "stop that run, or give this one another directory (--run_name, --output_dir, --checkpoint_dir)"
        return Refusal(f"{self.path.parent} is in use by {_name(holder)}; {way_out}")

    def _write(self, descriptor: int) -> None:
        content = json.dumps({**self._content, "heartbeat": int(time.time())}).encode() + b"\n"
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)  # other machines see what reached the server

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with self._writing, suppress(OSError):  # a full disk must not end the run
                if self._descriptor >= 0:
                    self._write(self._descriptor)


def _record_lock(descriptor: int) -> Literal["ours", "held", "unsupported"]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno in (errno.EACCES, errno.EAGAIN) else "unsupported"
    return "ours"


def _read_holder(descriptor: int) -> dict[str, Any]:
    """What the lock file says; empty if released or unreadable."""
    try:
        holder, _ = json.JSONDecoder().raw_decode(os.pread(descriptor, 4096, 0).decode())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("heartbeat"), int) else {}


def _may_live(holder: dict[str, Any], kernel: str) -> bool:
    """Whether a holder that the kernel did not report may still be running, as far as its heartbeat tells."""
    if not holder or (kernel == "ours" and holder.get("machine") == _machine()):
        return False
    return time.time() - holder["heartbeat"] < STALE_SECONDS


def _machine() -> str:
    """Names the running kernel: containers on one machine differ in host name but share their locks."""
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
