"""What is typed, or piped in, while a run trains: lines from standard input, where reading it takes nothing from anybody."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from contextlib import suppress

from trainer.distributed.signals import launched, stat_fields


class StandardInput:
    """Standard input, if people or programs type into it."""

    def __init__(self) -> None:
        self._kind, self._received = _kind(), b""

    def commands(self) -> set[str]:
        """The lines waiting, in lower case. Polled, not read by a thread, which would steal a debugger's input."""
        if self._kind is None or (self._kind == "terminal" and not _owns_terminal()):
            return set()
        # Should the shell take the terminal back right now, a blocked SIGTTIN makes the read fail, not suspend us.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        received = None
        with suppress(OSError):
            received = os.read(0, 65536) if select.select([0], [], [], 0)[0] else None
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if received is None:
            return set()
        if not received:
            self._kind, received = None, b"\n"  # a last line may lack its end
        *lines, self._received = (self._received[-100:] + received).split(b"\n")
        return {line.strip().lower().decode(errors="replace") for line in lines} - {""}


def _kind() -> str | None:
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
        _, _, group, _, terminal, foreground = stat_fields(os.getppid())[:6]
        return launched(os.environ) and group == foreground and int(terminal) == os.fstat(0).st_rdev
    return False
