"""`--stop_when COMMAND`: polls a command, such as one that asks a cloud whether it is about to take this machine away."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress

POLL_SECONDS = 5.0
LIMIT_SECONDS = 30.0  # for one run of the command
NOT_RUN = (126, 127)  # the shell's exit statuses for a command that it cannot run


class StopCommand:
    """Runs a shell command every POLL_SECONDS, in a thread, until it exits with 0. Then `says_stop` is True."""

    def __init__(self, command: str, log: Callable[[str], None]) -> None:
        self._command, self._log, self._over = command, log, threading.Event()
        self.says_stop = False
        self._thread = threading.Thread(target=self._ask, name="stop command", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Run the command no more."""
        self._over.set()

    def _ask(self) -> None:
        warned = False
        nothing = subprocess.DEVNULL
        while not self.says_stop and not self._over.is_set():
            status: int | None = None
            with suppress(subprocess.TimeoutExpired):  # which does not mean: stop
                status = subprocess.run(
                    self._command, shell=True, timeout=LIMIT_SECONDS, stdin=nothing, stdout=nothing, stderr=nothing
                ).returncode
            if status in NOT_RUN and not warned:
                warned = True
                self._log(f"WARNING: --stop_when: the shell cannot run {self._command!r} (exit {status}); mend the command")
            self.says_stop = status == 0
            self._over.wait(POLL_SECONDS)
