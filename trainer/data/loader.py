"""Reads this process's batches, with or without worker processes."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from trainer.command_line.sections import Run
from trainer.data.bad_samples import guarded
from trainer.distributed.hardware import sum_dtype
from trainer.distributed.signals import reset_in_worker
from trainer.errors import LOST, UserError, one_line

if TYPE_CHECKING:
    from trainer.recipe import Batch

GRACE_SECONDS = 1.0  # for workers to end by themselves
POLL_SECONDS = 0.5  # how often the wait for a batch looks for a stop request or a dead worker


class StopWaiting(Exception):  # noqa: N818 - not an error
    """A stop was requested while waiting for a batch, which may never come."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied asynchronously from page-locked memory. On Apple's GPUs float64 becomes float32."""
    if device.type == "mps":
        batch = {
            name: tensor.to(sum_dtype(device)) if tensor.dtype == torch.float64 else tensor for name, tensor in batch.items()
        }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def identity(batch: Any) -> Any:
    """Collate function that does nothing: `__getitems__` returns whole batches."""
    return batch


def read(
    dataset: Any, order: Any, run: Run, device: torch.device, stop_requested: Callable[[], bool] = lambda: False
) -> Iterator[Batch]:
    """Batches of `dataset` in `order` (a batch sampler), on the CPU unless the data set generates on the device.

    A DataLoader is used only for worker processes or page-locked memory. With workers, waiting for a batch raises StopWaiting
    once `stop_requested()`, and UserError if a worker was killed or hangs.
    """
    dataset = guarded(dataset, run)
    pinned, on_device = run.pin_memory and device.type == "cuda", getattr(dataset, "on_device", False)
    if on_device:
        dataset.to(device)
    if on_device or not (run.num_workers or pinned):
        return (dataset.__getitems__(numbers) for numbers in order)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=identity,
        num_workers=run.num_workers,
        prefetch_factor=run.prefetch_factor if run.num_workers else None,
        pin_memory=pinned,
        timeout=POLL_SECONDS if run.num_workers else 0,
        multiprocessing_context=_worker_context() if run.num_workers else None,
        worker_init_fn=reset_in_worker,
        # A DataLoader's iterator draws a seed; with a generator of its own it does not advance torch's.
        generator=torch.Generator(),
    )
    return _FromWorkers(loader, run, device, stop_requested) if run.num_workers else iter(loader)


def _worker_context() -> BaseContext:
    """Start workers as forks of a clean server process, `trainer.data.worker_server`. Data sets must therefore be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "trainer.data.worker_server"])
    return context


class _FromWorkers(Iterator["Batch"]):
    """The batches of a DataLoader with workers, fetched by a thread, so that a hanging worker cannot hang the training process.

    The DataLoader's own time-out is not enough: to receive a batch it asks the worker for the file descriptors of its tensors,
    and if the worker has been suspended it waits for ever.
    """

    def __init__(self, loader: DataLoader[Any], run: Run, device: torch.device, stop_requested: Callable[[], bool]) -> None:
        self._iterator: Any = iter(loader)
        self._device, self._stop_requested = device, stop_requested
        # Less than the other processes wait for this one, so that it can still tell them the reason.
        self._limit_seconds = 0.9 * 60 * run.timeout_minutes
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._waiting = False
        self._thread = threading.Thread(target=self._fetch, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if not self._waiting:
            self._wanted.put(True)
        self._waiting, started = True, time.monotonic()
        while True:
            try:
                fetched = self._fetched.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if self._stop_requested():
                    raise StopWaiting from None
                if time.monotonic() - started > self._limit_seconds:
                    raise UserError(
                        f"no batch for {self._limit_seconds / 60:g} minutes (nine tenths of --timeout_minutes): a data worker "
                        "hangs, perhaps on files of a server that is gone; the same command goes on from the newest checkpoint",
                        LOST,
                    ) from None
        self._waiting = False
        if isinstance(fetched, Exception):
            raise fetched
        return fetched

    def _fetch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread
        while self._wanted.get():
            try:
                batch: Batch | Exception = self._next_batch()
            except Exception as error:
                batch = error
            self._fetched.put(batch)

    def _next_batch(self) -> Batch:
        while True:
            try:
                return next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                text = str(error)  # "Caught ..." if a worker raised it; a dead worker is seen as a broken connection
                if text.startswith("DataLoader timed out"):
                    continue
                if text.startswith("DataLoader worker") or (isinstance(error, OSError | EOFError) and "Caught" not in text):
                    raise UserError(
                        "a data worker was killed, by the system if memory ran out (then lower --num_workers or "
                        f"--prefetch_factor); the same command goes on from the newest checkpoint ({one_line(error, 200)})",
                        LOST,
                    ) from error
                raise

    def close(self) -> None:
        """End the workers; kill those that have not ended within GRACE_SECONDS, or at once while a batch is still awaited."""
        self._wanted.put(False)
        ending = threading.Thread(target=self._end, name="ending workers", daemon=True)
        ending.start()
        ending.join(0 if self._waiting else GRACE_SECONDS)
        for worker in self._iterator._workers:
            worker.kill()
        ending.join(10 * POLL_SECONDS)  # not for ever: a worker may hang in the kernel, where it cannot be killed

    def _end(self) -> None:
        self._thread.join()
        self._iterator._shutdown_workers()


def close(batches: Iterator[Batch]) -> None:
    """End the worker processes of `read` now, rather than at garbage collection."""
    if isinstance(batches, _FromWorkers):
        batches.close()
