"""Contenders, which take training steps on demand, and rounds of them in turn (A B B A ...), so that a slow moment affects all.

Our loop and transformers' Trainer call their own steps. Each contender therefore runs in a thread of its own, which is blocked
between its rounds; two threads never work at the same time. So does a bare loop, although it could do without: in the main
thread, whose memory comes from another arena of malloc, the same step takes some 30 us longer on a CPU.
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

LAST_SECONDS = 15.0  # left for what a piece does after its rounds
Within = Callable[[], AbstractContextManager[Any]]


class Closed(BaseException):
    """Raised inside a loop to end it. No Exception, so that nothing in the loop catches it."""


class Contender:
    """A training loop in a thread of its own, blocked between orders. The loop must call `step_done` after each step."""

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
        """End the loop at the step where it waits, and release it with what it holds: model, optimizer, data."""
        self._orders.put((0, nullcontext))
        if self._thread.ident:
            self._thread.join(60)
        self.loop = None

    def step_done(self) -> None:
        """Called by the loop after each step. Blocks after the last step of an order until the next one."""
        self.on_step()
        self._left -= 1
        if self._left == 0:
            self._context.__exit__(None, None, None)
            self._answers.put(None)
            self._wait()

    def _wait(self) -> None:
        """Wait for the next order and enter its context. Raises Closed if it is to end."""
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
    """The measurements of `interleave`, by name of the contender."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """seconds per step in each round"""
    peak_gib: dict[str, float] = field(default_factory=dict)
    """peak GPU memory, without that of the other contenders"""
    failed: dict[str, str] = field(default_factory=dict)
    """the reason in one line; the error itself would keep the tensors of its traceback alive"""

    def median(self, name: str) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, beside: str) -> float:
        """Seconds of a step of `beside` over those of `name`: the median over the rounds."""
        pairs = zip(self.seconds[name], self.seconds[beside], strict=True)
        return statistics.median(other / own for own, other in pairs)

    def notes(self) -> list[str]:
        """A line for each contender that has failed."""
        return [f"{name}: {why}" for name, why in self.failed.items()]

    def spread(self) -> dict[str, list[float]]:
        """{contender: [fastest, median, slowest] in ms per step}."""
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
    """Make each contender and let it warm up (and compile) for `warmup` steps; then `rounds` rounds of `steps` steps of each.

    A contender that fails is left out of the rest, unless it is the `required` one, whose error is raised. `until`: a time on
    the monotonic clock; to end before it, contenders that are made late and the last rounds are left out. On a CPU, seconds are
    CPU time of this process, because other processes may use the cores too.
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
            for name in list(contenders)[:: -1 if number % 2 else 1]:  # turn round, so that none always follows the same one
                attempt(name, lambda name=name: take_round(name))  # type: ignore[misc]
    finally:
        for contender in contenders.values():
            contender.close()
        contenders.clear()
        free(device)
    return measured


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Free GPU memory that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
