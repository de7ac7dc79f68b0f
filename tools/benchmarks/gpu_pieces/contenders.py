"""What is compared: training steps on call, in interleaved rounds (A B B A ...), so that a slow moment meets all alike.

Our loop, and the Trainer of transformers, call steps themselves. So every contender lives in a thread of its own, which stands
still between its rounds: never do two threads work at once. A bare loop does too, though it need not: the main thread's memory
comes from another arena of malloc, from which the same loop takes some 30 us a step longer on a CPU.
"""

from __future__ import annotations

import gc
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_pieces.results import reason

LAST_SECONDS = 15.0  # what a piece does after its rounds
Within = Callable[[], AbstractContextManager[Any]]


class Closed(BaseException):
    """Raised inside a loop to end it: nothing that catches errors catches this."""


class Contender:
    """A training loop in a thread of its own, which stands still between orders. The loop calls `step_done` after each step."""

    def __init__(self, loop: Callable[[], object]) -> None:
        self.loop: Callable[[], object] | None = loop
        self._orders: queue.SimpleQueue[tuple[int, Within]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._left, self._context = 0, nullcontext()  # type: tuple[int, AbstractContextManager[Any]]
        self.on_step: Callable[[], None] = lambda: None

    def run(self, steps: int, within: Within = nullcontext) -> None:
        """Let the loop take so many steps, inside the context that `within` makes (a profiler). Raises what the loop raises."""
        self._orders.put((steps, within))
        if not self._thread.ident:
            self._thread.start()
        error = self._answers.get()
        if error is not None:
            raise error

    def close(self) -> None:
        """End the loop where it stands, and let go of everything."""
        self._orders.put((0, nullcontext))
        if self._thread.ident:
            self._thread.join(60)
        self.loop = None

    def step_done(self) -> None:
        """A step is over: go on, or stand still until the next order."""
        self.on_step()
        self._left -= 1
        if self._left == 0:
            self._context.__exit__(None, None, None)
            self._answers.put(None)
            self._wait()

    def _wait(self) -> None:
        self._left, within = self._orders.get()
        if self._left == 0:
            raise Closed
        self._context = within()
        self._context.__enter__()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            self._wait()
            assert self.loop is not None
            self.loop()
        except Closed:
            return
        except BaseException as raised:
            error = raised
        self._answers.put(error)


class Steps(Contender):
    """A loop that does nothing but call `step`."""

    def __init__(self, step: Callable[[], object]) -> None:
        def loop() -> None:
            while True:
                step()
                self.step_done()

        super().__init__(loop)


class StepsHere(Contender):
    """The same in the thread that orders the steps, for CUDA graphs: torch keeps them for one thread alone."""

    def run(self, steps: int, within: Within = nullcontext) -> None:
        """Take so many steps; `loop` is one of them."""
        assert self.loop is not None
        with within():
            for _ in range(steps):
                self.loop()


@dataclass
class Rounds:
    """What `interleave` has measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """of a step, by contender, a number for each round"""
    peak_gib: dict[str, float] = field(default_factory=dict)
    """GPU memory at its highest, what the other contenders hold left out"""
    failed: dict[str, str] = field(default_factory=dict)
    """why in one line: an error itself would keep the tensors of its traceback"""

    def median(self, name: str) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, beside: str) -> float:
        """How many times as long a step of `beside` takes: the median over pairs of the same round."""
        pairs = zip(self.seconds[name], self.seconds[beside], strict=True)
        return statistics.median(other / own for own, other in pairs)

    def notes(self) -> list[str]:
        """Who is missing, and why."""
        return [f"{name}: {why}" for name, why in self.failed.items()]

    def spread(self) -> dict[str, list[float]]:
        """{contender: [fastest, median, slowest] in ms}."""
        return {
            name: [1000 * min(values), 1000 * statistics.median(values), 1000 * max(values)]
            for name, values in self.seconds.items()
        }


def interleave(
    makers: Mapping[str, Callable[[], Contender]],
    device: torch.device,
    rounds: int,
    steps: int,
    warmup: int,
    required: str = "",
    until: float = math.inf,
) -> Rounds:
    """Make each contender and let it warm up (and compile); then rounds of `steps` steps of each in turn.

    One that fails is left out of the rest, unless it is the `required` one, whose error is raised. `until`: the end on the
    monotonic clock, before which fewer contenders, or fewer rounds, are what can still be had. On a CPU, which others may want
    too, seconds are those of this process on it.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    no_more_contenders = until - 0.4 * (until - time.monotonic())
    measured, contenders, held = Rounds(), dict[str, Contender](), dict[str, int]()

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if name == required:
                raise
            measured.failed[name] = reason(error)
            measured.seconds.pop(name, None)
            if name in contenders:
                contenders.pop(name).close()

    def make(name: str, maker: Callable[[], Contender]) -> None:
        if time.monotonic() > no_more_contenders and name != required:
            raise TimeoutError("no time left to make it")
        before = allocated(device)
        contenders[name] = maker()
        contenders[name].run(warmup)
        wait_for(device)
        held[name] = allocated(device) - before
        measured.seconds[name] = []

    def take_round(name: str) -> None:
        others = allocated(device) - held[name]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wait_for(device)
        started = clock()
        contenders[name].run(steps)
        wait_for(device)
        measured.seconds[name].append((clock() - started) / steps)
        if device.type == "cuda":
            own = (torch.cuda.max_memory_allocated(device) - others) / 2**30
            measured.peak_gib[name] = max(own, measured.peak_gib.get(name, 0.0))

    try:
        for name, maker in makers.items():
            attempt(name, lambda name=name, maker=maker: make(name, maker))  # type: ignore[misc]
        for number in range(rounds):
            if time.monotonic() > until - LAST_SECONDS and all(measured.seconds.values()):
                break
            for name in list(contenders)[:: -1 if number % 2 else 1]:  # so that none always follows the same one
                attempt(name, lambda name=name: take_round(name))  # type: ignore[misc]
    finally:
        for contender in contenders.values():
            contender.close()
        contenders.clear()
        free(device)
    return measured


def wait_for(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
