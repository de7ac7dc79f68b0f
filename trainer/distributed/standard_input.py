"""Commands that are typed or piped into a run while it trains. Standard input is read only if no other program wants it."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from contextlib import suppress

from trainer.distributed.signals import launched, stat_fields


class StandardInput:
    """Reads lines from standard input, if it is a pipe, a socket, or the terminal of which we are the foreground job."""

    def __init__(self) -> None:
        self._kind, self._received = _kind(), b""

    def commands(self) -> set[str]:
        """The complete lines that have arrived since the last call, in lower case. Never blocks.

        Called now and then, because a thread that waits for input would take it from a debugger.
        """
        if self._kind is None or (self._kind == "terminal" and not _owns_terminal()):
            return set()
        # If the shell takes the terminal back just now, the read fails; without the block, SIGTTIN would suspend us.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        received = None
        with suppress(OSError):
            received = os.read(0, 65536) if select.select([0], [], [], 0)[0] else None
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if received is None:
            return set()
        if not received:
            self._kind, received = None, b"\n"  # the end of the input also ends its last line
        *lines, self._received = (self._received[-100:] + received).split(b"\n")
        return {line.strip().lower().decode(errors="replace") for line in lines} - {""}


def _kind() -> str | None:
    """`pipe` (or socket), `terminal`, or None where no commands can come from: /dev/null, a file, a closed stdin."""
    if sys.stdin is None:  # closed when Python started; descriptor 0 may be any other file by now
        return None
    with suppress(OSError):
        mode = os.fstat(0).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe"
        if os.isatty(0):
            return "terminal"
    return None


def _owns_terminal() -> bool:
    """Whether we are the foreground job of the terminal on stdin; reading it from the background would suspend the job."""
    with suppress(OSError):
        return os.tcgetpgrp(0) == os.getpgrp()
    # torchrun puts each process into a session without a terminal: then torchrun itself must be the foreground job.
    with suppress(OSError, ValueError, IndexError):
        _, _, group, _, terminal, foreground = stat_fields(os.getppid())[:6]
        return launched(os.environ) and group == foreground and int(terminal) == os.fstat(0).st_rdev
    return False
