"""The run directory: its files, and how they are written. Rank 0 only."""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from trainer.command_line.secrets import redact, redact_text
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.lock import Lock, now_iso

MAX_STANDSTILLS = 3
"""how many launches in a row may save nothing before a restart is refused"""
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "safetensors")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), so that a reader sees the old file or the new one, also after a crash at any moment.

    On an OSError (disk full, no permission) the old file stays, and no temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()  # of a killed process with the same pid
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
    """Make new and renamed entries of a directory survive a crash of the machine, where the file system can: not all can."""
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
        self.stop_file = path / "stop"  # the user makes it, by `touch stop`, to stop the run
        self.status_file = path / "status"  # likewise, to have the run print its status
        self._began: dict[str, int] = {}
        self._made: list[Path] = []
        self._locks: list[Lock] = []

    def prepare(self, log: Callable[[str], None]) -> None:
        """Make the folders, try to write into them, and lock both, as another run's `--checkpoint_dir` may be the same.

        UserError (exit code 5) if that fails, or if a pipe or folder has the name of one of the run's files; exit code 2 if
        another run holds a lock. Call `release` afterwards in any case.
        """
        for folder in (self.path, self.checkpoints):  # makes the second only once the first is locked
            self._make(folder)
            if folder.resolve() not in (lock.path.parent for lock in self._locks):
                self._locks.append(Lock(folder.resolve(), log))
                self._locks[-1].acquire()
        for file in (self.config, self.command, self.environment, self.metrics, self.log, self.status):
            if file.is_fifo() or file.is_socket() or file.is_dir():  # opening a pipe may block for ever
                raise UserError(f"{file} is not an ordinary file; remove it, or choose another --output_dir", CHECKPOINT)

    def _make(self, folder: Path) -> None:
        flag = "--output_dir" if self.path in (folder, folder.parent) else "--checkpoint_dir"
        try:
            str(folder).encode()
            for link in (folder, *folder.parents):
                if link.is_symlink() and not link.exists():
                    way_out = f"mount or make that, or choose another with {flag}"
                    target = os.readlink(link)
                    raise UserError(f"{link} is a link to {target}, which does not exist; {way_out}", CHECKPOINT)
            missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made += missing
            probe = folder / f".writable.{os.getpid()}"
            write_text_atomic(probe, "x")
            probe.unlink()
        except UnicodeEncodeError:  # safetensors writes to such a path, but cannot read from it
            message = f"{str(folder)!a} is not UTF-8; choose another folder with {flag}"
            raise UserError(message, CHECKPOINT) from None
        except OSError as error:
            why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
            message = f"cannot write to {folder}: {why}; mend that, or choose another with {flag}"
            raise UserError(message, CHECKPOINT) from None

    def release(self, used: bool = True) -> None:
        """Release the locks. If nothing was written (not `used`), first remove the folders that `prepare` has made, so that a
        typing error leaves no run behind."""
        locks = {lock.path for lock in self._locks if lock.held}
        for folder in sorted(() if used else self._made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty: it holds the lock of another run, which was faster, or somebody's file
                if locks.issuperset(folder.resolve().iterdir()):  # the path may lead through a link; locks are resolved
                    (folder / Lock.NAME).unlink(missing_ok=True)
                folder.rmdir()
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def begin(self, step: int, restarted: bool) -> None:
        """Count the launches in a row that saved nothing after `step`, where this one begins. A launch that is no automatic
        restart (`restarted` False) counts anew.

        UserError for a restart after MAX_STANDSTILLS of them, with what ended the last one.
        """
        try:
            before = json.loads(self.status.read_text(encoding="utf-8"))
            standstills = before["standstills"] + 1 if restarted and before["began_at"] == step else 0
            ended = before["reason"] or "it was killed"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no status.json, or not one of this package
            standstills = 0
        self._began = {"began_at": step, "standstills": standstills}
        if standstills >= MAX_STANDSTILLS:
            problem = f"{standstills} launches in a row saved nothing after step {step:,}; the last one ended so: {ended}"
            self.write_status("failed", problem, step)
            raise UserError(f"{problem}. Mend that, and start the same command again")

    def write_status(
        self,
        state: Literal["running", "stopped", "finished", "failed"],
        reason: str | None = None,
        step: int | None = None,
        checkpoint: str | Path | None = None,
    ) -> bool:
        """Replace status.json. Returns False if that fails: an error here must not hide the one that it reports."""
        status: dict[str, Any] = {"state": state, "reason": reason and redact_text(reason), "step": step}
        status |= {"checkpoint": checkpoint and str(checkpoint), "time": now_iso()}
        status |= {"pid": os.getpid(), "host": socket.gethostname()} | self._began
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
        facts: dict[str, Any] = {"time": now_iso(), "host": socket.gethostname(), "platform": platform.platform()}
        facts |= {"cpu_count": os.cpu_count(), "git_commit": _git_commit(), "python": platform.python_version()}
        facts |= {package: _version(package) for package in PACKAGES} | extra
        write_text_atomic(self.environment, redact_text(json.dumps(facts, indent=2, default=str)) + "\n")


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None if git does not track it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=10, text=True).stdout.strip()

    try:  # first whether git tracks this file: an installed package may lie inside some other repository
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
