"""How large a micro-batch is with `--fit_batch`: as large as memory allows, while the effective batch stays as it was given.

What a step computes does not follow from it, as it does not from the number of processes; dropout alone draws other masks.
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


def whole(optimisation: Optimisation) -> Optimisation:
    """A step in one micro-batch."""
    return dataclasses.replace(optimisation, batch_size=optimisation.effective_batch_size, gradient_accumulation_steps=1)


def fit(session: Session, step: int, log: Log) -> None:
    """Before the first step of a launch: split until forward and backward fit on every process. Collective."""
    while True:
        error = _tried(session, step)
        if not session.launch.control.sum([float(error is not None)]).wait()[0]:
            break
        _split_further(session, error or MemoryError("out of memory on another process"))
    log(f"Fitted to memory: {_said(session)}")


def can_recover(session: Session, error: Exception) -> bool:
    """Whether smaller micro-batches may help. Not where other processes wait for this step."""
    return session.config.run.fit_batch and session.launch.processes == 1 and ran_out_of_memory(error)


def recover(session: Session, step: int, error: Exception) -> str:
    """Split further where memory ran out behind a step; what to say of it. Raises the error where there is no smaller split."""
    _split_further(session, error)
    return f"Out of memory in step {step + 1:,} ({one_line(error, 100)}); it begins again with {_said(session)}"


def _said(session: Session) -> str:
    o = session.config.optimisation
    return f"{o.batch_size} samples x {o.gradient_accumulation_steps} accumulation = {o.effective_batch_size}"


def _split_further(session: Session, error: Exception) -> None:
    """Take the next smaller micro-batch that divides; raises the error where there is none. Clears gradients."""
    before, processes = session.config.optimisation, session.launch.processes
    effective = before.effective_batch_size
    size = next((n for n in range(before.batch_size - 1, processes - 1, -1) if effective % n == 0), None)
    if size is None:
        raise error
    error.__traceback__ = None  # whose frames hold activations
    after = dataclasses.replace(before, batch_size=size, gradient_accumulation_steps=effective // size)
    session.config = dataclasses.replace(session.config, optimisation=after)
    session.backend.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.compiler.reset()  # or the next graph would be compiled for any size, and be slower


def _tried(session: Session, step: int) -> Exception | None:
    """How the first micro-batches behind a step run out of memory; None if they do not."""
    launch, backend, run = session.launch, session.backend, session.config.run
    here = dataclasses.replace(session.config, run=dataclasses.replace(run, num_workers=0, pin_memory=False))
    batches = dataclasses.replace(session, config=here).training_batches(step)
    backend.model.train()
    parameters, kept = dict(session.network.named_parameters()), backend.state_layout.tensors
    try:
        # What the optimizer will keep from the first update on.
        later = {} if backend.optimizer.state else kept
        reserved = [torch.empty_like(parameters[name]) for name, keys in later.items() for _ in keys]
        for _ in range(min(2, here.optimisation.gradient_accumulation_steps)):  # the second meets the gradients of the first
            batch = next(batches)
            batch.pop(REPLACED, None)
            with backend.micro_step(last=False):  # no process waits for another
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
