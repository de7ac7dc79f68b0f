"""Hands rows of metrics to a tracker in a thread of its own: a server that stalls must not delay a training step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping

from trainer.recipe import Log

Row = dict[str, float]
"""metrics, and `step`"""
FINISH_SECONDS = 10.0  # how long a tracker's last upload may take; --max_training_hours includes it
EXIT_SECONDS = 15.0  # FINISH_SECONDS, and what else the thread may take


class Feed:
    """Calls `send` in a thread, with an iterator over the rows that `put` adds. `send` returns once all of them are delivered.

    If it raises, the error is logged, and later rows are dropped.
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
        """End the iterator. Returns whether `send` came to its end within EXIT_SECONDS."""
        self._rows.put(None)
        self._thread.join(EXIT_SECONDS)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._send(iter(self._rows.get, None))
        except Exception as error:
            self._log(f"{self._name}: {error}; training goes on without it")
