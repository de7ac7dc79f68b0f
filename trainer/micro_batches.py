"""`--fit_batch`: the largest micro-batch that fits in memory, with the same effective batch.

The split does not change what a step computes, as the number of processes does not; only dropout draws other masks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from trainer.command_line.sections import Optimisation
from trainer.data import loader
from trainer.data.bad_samples import REPLACED
from trainer.distributed.peers import ran_out_of_memory
from trainer.errors import one_line
from trainer.recipe import Log

if TYPE_CHECKING:
    from trainer.setup import Session


def in_one_micro_batch(optimisation: Optimisation) -> Optimisation:
    """The same effective batch without accumulation."""
    return dataclasses.replace(optimisation, batch_size=optimisation.effective_batch_size, gradient_accumulation_steps=1)


def fit_to_memory(session: Session, step: int, log: Log) -> None:
    """Before the first step of a launch: make micro-batches smaller until forward and backward fit on every process.

    Tries the micro-batches after `step`. Collective. Raises the out-of-memory error if the smallest does not fit.
    """
    while True:
        error = _out_of_memory(session, step)
        if not session.launch.control.sum([float(error is not None)]).wait()[0]:
            break
        _split_further(session, error or MemoryError("out of memory on another process"))
    log(f"Fitted to memory: {_split(session)}")


def can_recover(session: Session, error: Exception) -> bool:
    """Whether `recover` may help: in a run of one process, as others would wait for this step."""
    return session.config.run.fit_batch and session.launch.processes == 1 and ran_out_of_memory(error)


def recover(session: Session, step: int, error: Exception) -> str:
    """After step + 1 ran out of memory: make micro-batches smaller. Returns a line on it; raises `error` if that cannot be."""
    _split_further(session, error)
    return f"Out of memory in step {step + 1:,} ({one_line(error, 100)}); it begins again with {_split(session)}"


def _split(session: Session) -> str:
    """The split of the effective batch, as text."""
    o = session.config.optimisation
    return f"{o.batch_size} samples x {o.gradient_accumulation_steps} accumulation = {o.effective_batch_size}"


def _split_further(session: Session, error: Exception) -> None:
    """Take the next smaller micro-batch that divides the effective batch; clear gradients. Raises `error` if there is none."""
    before, processes = session.config.optimisation, session.launch.processes
    effective = before.effective_batch_size
    size = next((n for n in range(before.batch_size - 1, processes - 1, -1) if effective % n == 0), None)
    if size is None:
        raise error
    error.__traceback__ = None  # its frames hold activations
    after = dataclasses.replace(before, batch_size=size, gradient_accumulation_steps=effective // size)
    session.config = dataclasses.replace(session.config, optimisation=after)
    session.backend.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.compiler.reset()  # or torch would compile the next graph for dynamic sizes, which is slower


def _out_of_memory(session: Session, step: int) -> Exception | None:
    """The out-of-memory error of forward and backward of the micro-batches after `step`, without an update; None: they fit."""
    launch, backend, run = session.launch, session.backend, session.config.run
    here = dataclasses.replace(session.config, run=dataclasses.replace(run, num_workers=0, pin_memory=False))
    batches = dataclasses.replace(session, config=here).training_batches(step)
    backend.model.train()
    parameters, kept = dict(session.network.named_parameters()), backend.state_layout.tensors
    try:
        # Room for the optimizer state, which is allocated in the first update.
        missing = {} if backend.optimizer.state else kept
        reserved = [torch.empty_like(parameters[name]) for name, keys in missing.items() for _ in keys]
        for _ in range(min(2, here.optimisation.gradient_accumulation_steps)):  # from the second on there are gradients too
            batch = next(batches)
            batch.pop(REPLACED, None)
            with backend.micro_step(last=False):  # without collectives: another process may be out of memory
                loss_sums = backend.model(loader.to_device(batch, launch.device))
                backend.backward(loss_sums, torch.ones_like(loss_sums))
        del reserved
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return error
    finally:
        backend.optimizer.zero_grad(set_to_none=True)
    return None
