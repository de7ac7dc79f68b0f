"""The loader: reads this process's part of the stream, batch by batch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.command_line.sections import Run
from trainer.data.bad_samples import guarded
from trainer.distributed.signals import reset_in_worker

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; asynchronous from page-locked memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def identity(batch: Any) -> Any:
    """Collate function: `__getitems__` gives whole batches."""
    return batch


def read(dataset: Any, order: Any, run: Run, device: torch.device) -> Iterator[Batch]:
    """Batches of `dataset` in `order`, through a DataLoader; from the data set itself if that has nothing to do.

    It has where there are worker processes, or page-locked memory to copy to.
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
        multiprocessing_context=_worker_context() if run.num_workers else None,
        worker_init_fn=reset_in_worker,
        # An iterator draws a seed when it is made; from a generator of its own, so that it does not shift dropout.
        generator=torch.Generator(),
    )
    return iter(loader)


def _worker_context() -> BaseContext:
    """How workers are started: by a clean server process, `trainer.data.worker_server`. Data sets have to be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "trainer.data.worker_server"])
    return context


def close(batches: Iterator[Batch]) -> None:
    """End the worker processes of `read` now, rather than when the interpreter gets to it."""
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
