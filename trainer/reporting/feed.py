"""Rows on their way to a tracker that may stall: a server that is gone must not hold up a training step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping

from trainer.recipe import Log

Row = dict[str, float]
"""metrics, and `step`"""
FINISH_SECONDS = 10.0  # how long the last upload may take: it counts against --max_training_hours
EXIT_SECONDS = 15.0  # that, and what its thread may take on top


class Feed:
    """Hands rows to `send`, which takes them one by one in a thread of its own and returns once they are where they belong.

    An error of it is named once, and what comes later is left out.
    """

    def __init__(self, name: str, send: Callable[[Iterator[Row]], None], log: Log) -> None:
        self._name, self._send, self._log = name, send, log
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row. Returns at once."""
        if self._thread.is_alive():
            self._rows.put({"step": step, **values})

    def end(self) -> bool:
        """No row follows; whether all were sent within `EXIT_SECONDS`."""
        self._rows.put(None)
        self._thread.join(EXIT_SECONDS)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._send(iter(self._rows.get, None))
        except Exception as error:
            self._log(f"{self._name}: {error}; training goes on without it")
