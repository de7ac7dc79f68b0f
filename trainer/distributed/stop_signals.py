"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP as requests to stop."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from trainer.distributed import signals
from trainer.distributed.signals import SIGNALS, launched, listen_to_signals
from trainer.errors import INTERRUPTED


class StopSignals:
    """Notes which of the signals come between `catch` and `release`, in the main thread. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: set[str] = set()
        """names of signals"""
        self.unsaved = False
        """whether to end the process now would lose steps"""
        self._previous: dict[signal.Signals, Any] = {}
        self._first_interrupt = 0.0

    def catch(self) -> None:
        """Install the handlers. A SIGHUP that is ignored already (nohup) stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                handler = signal.signal(number, self._handle)
                self._previous[number] = signal.SIG_DFL if handler is None else handler
        self._stop_listening = listen_to_signals(self._hear)

    def release(self) -> None:
        """Restore the previous handlers."""
        self._stop_listening()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        """The signal handler, in the main thread."""
        self.received.add(signal.Signals(number).name)
        signals.free_full_streams()

    def _hear(self, number: int) -> None:
        """Like `_handle`, but called at once in a thread, also while the main thread is in a C call."""
        self.received.add(signal.Signals(number).name)
        if number == signal.SIGTERM:
            signals.terminating.set()
        if number == signal.SIGINT:
            self._leave_at_second_interrupt()

    def _leave_at_second_interrupt(self) -> None:
        self._first_interrupt = self._first_interrupt or time.monotonic()
        echo_seconds = 1.0 if launched(os.environ) else 0.2  # a launcher may pass the terminal's Ctrl-C on: one, not two
        if time.monotonic() - self._first_interrupt > echo_seconds:
            signals.say(f"\nsecond interrupt: leaving at once, {'without saving' if self.unsaved else 'nothing is lost'}\n")
            os._exit(INTERRUPTED)
