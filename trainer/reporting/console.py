"""The console: lines on stdout and in train.log, and on a terminal a progress bar below them.

No failure here ends training or delays it for long: a closed pipe (`| head`), a full one that nobody reads, a full disk, a
terminal that is gone.
"""

from __future__ import annotations

import math
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command_line.secrets import redact_text
from trainer.distributed.signals import writable

if TYPE_CHECKING:
    from tqdm import tqdm

READER_SECONDS = 1.0  # how long to wait for a reader of a full pipe; after that not at all, until it reads again


class Console:
    """Prints on rank 0 (`is_main`) and nothing on the others. Never prints a URL that holds a secret.

    `log_path` may be unknown at first: `open_log` writes the lines so far. Without a log file every line waits until stdout
    takes it; with one, a line that nobody reads within READER_SECONDS is only in the file.
    """

    def __init__(self, log_path: Path | None, is_main: bool) -> None:
        self._is_main = is_main
        self._log_path = log_path
        self._unwritten = ""
        self._log_failed = False
        self._unread_lines = 0
        self._bar: tqdm | None = None
        self._logging = threading.Lock()  # threads of trackers and alerts log too

    def open_log(self, path: Path) -> None:
        """Appends all lines to `path`: first those so far, then every new one."""
        self._log_path = path
        self._append("")

    def close_log(self) -> None:
        """Appends no further lines to the file."""
        self._log_path = None

    def log(self, text: str) -> None:
        """Prints `text` on stdout, above the progress bar, and appends it to train.log."""
        if self._is_main:
            text = redact_text(text)
            self._print(text)
            self._append(text + "\n")

    def error(self, text: str, on_any_rank: bool = False, log_only: bool = False) -> None:
        """Prints `text` on stderr, and appends it to train.log, on rank 0.

        `on_any_rank`: prints it on this rank whichever it is, for an error of one rank. `log_only`: does not print it.
        """
        text = redact_text(text)
        if self._is_main:
            self._append(f"error: {text}\n")
        if not log_only and (self._is_main or on_any_rank):
            with suppress(OSError, ValueError):
                self._write(sys.stderr, f"error: {text}\n")

    def log_traceback(self, exc: BaseException, on_stderr: bool = False) -> None:
        """Writes the traceback of `exc` to train.log; what the user reads of it is up to the caller.

        `on_stderr`: prints it too, on any rank, as for a bug.
        """
        text = redact_text("".join(traceback.format_exception(exc)))
        if self._is_main:
            self._append(text)
        if on_stderr:
            with suppress(OSError, ValueError):
                self._write(sys.stderr, text)

    def progress(self, step: int, total_steps: int, loss: float, units_per_sec: float, unit: str, eta_seconds: float) -> None:
        """Shows the bar at `step` of `total_steps`, with the loss, the rate in `unit` (such as "tokens") and the time to go.

        On rank 0, and only if stderr is a terminal: in a pipe or a file a bar is a thousand lines of noise.
        """
        if not (self._is_main and sys.stderr and not sys.stderr.closed and sys.stderr.isatty()):
            return
        from tqdm import tqdm

        rate = tqdm.format_sizeof(units_per_sec) if math.isfinite(units_per_sec) else "?"

        def draw() -> None:
            if self._bar is None:
                tqdm.set_lock(threading.RLock())  # tqdm's default lock includes a semaphore between processes
                self._bar = tqdm(
                    total=total_steps,
                    initial=step,
                    bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {desc}",
                    dynamic_ncols=True,
                    miniters=1,  # redrawn by time (ten times a second at most), not by tqdm's guess of the speed
                    leave=False,
                )
            description = f"loss {loss:.4f}, {rate} {unit}/s, ETA {format_duration(eta_seconds)}"
            self._bar.set_description_str(description, refresh=False)
            self._bar.update(step - self._bar.n)

        self._try_bar(draw)

    def close(self) -> None:
        """Removes the progress bar. The console can still be used afterwards."""
        if self._bar is not None:
            self._try_bar(self._bar.close)
        self._bar = None

    def _print(self, text: str) -> None:
        stdout = sys.stdout
        if stdout is None:  # started with stdout closed
            return
        encoding = getattr(stdout, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # "²" on a Latin or ASCII terminal becomes "?"
        if self._bar is not None:
            self._try_bar(self._bar.clear)
        try:
            if self._unread_lines and self._write(stdout, f"[{self._unread_lines} lines that nobody read are in train.log]\n"):
                self._unread_lines = 0
            if not self._write(stdout, text + "\n"):
                self._unread_lines += 1
        except (OSError, ValueError):  # a pipe without a reader, a full disk; a closed file
            # A library's print would now raise, or the flush at exit would fail and turn the exit status into 120: redirect
            # stdout to nowhere (Python's documentation of `signal`, "Note on SIGPIPE").
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stdout.fileno())
        if self._bar is not None:
            self._try_bar(self._bar.refresh)

    def _write(self, stream: Any, text: str) -> bool:
        """Writes `text`; returns False if a full pipe, or a terminal after Ctrl-S, did not take all of it."""
        for start in range(0, len(text), select.PIPE_BUF // 4):  # a character takes at most four bytes
            seconds = 0.0 if self._unread_lines else READER_SECONDS
            if self._log_path is not None and not _writable(stream, seconds):
                return False
            print(text[start : start + select.PIPE_BUF // 4], end="", file=stream, flush=True)
        return True

    def _try_bar(self, draw: Callable[[], object]) -> None:
        """Calls `draw` if the terminal accepts output at once. If the terminal is gone, so is the bar, but nothing else."""
        try:
            if _writable(sys.stderr, 0.0):
                draw()
        except (OSError, ValueError):
            self._bar = None

    def _append(self, text: str) -> None:
        with self._logging:
            self._unwritten += text
            if self._log_path is None or not self._unwritten:
                return
            try:
                # Opened for each line: nothing is lost in a buffer if the process is killed, and a full disk may get space.
                with open(self._log_path, "a", encoding="utf-8", errors="replace") as file:
                    file.write(self._unwritten)
            except OSError as error:
                if not self._log_failed:
                    self._print(f"{self._log_path} cannot be written ({error.strerror}); training goes on")
                self._log_failed = True
            self._unwritten = ""


def _writable(stream: Any, seconds: float) -> bool:
    try:
        return writable(stream.fileno(), seconds)
    except (OSError, ValueError, AttributeError):  # no descriptor (StringIO), or closed: writing works or raises
        return True


def format_duration(seconds: float) -> str:
    """`42s`, `7m 05s`, `3h 20m` or `2d 04h`; `?` for a negative number, NaN or infinity."""
    if not (math.isfinite(seconds) and seconds >= 0):
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {secs:02}s" if minutes else f"{secs}s"
