"""Verifying a checkpoint once per launch: each process hashes its share of the files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.distributed.control import Control
from trainer.errors import UserError

T = TypeVar("T")
Verify = Callable[[Checkpoint], None]


def on_main(action: Callable[[Verify], T], control: Control) -> T:
    """`control.on_main` for an action that verifies checkpoints: its argument `verify` has all processes share the work.

    The action runs on rank 0. The other ranks wait here for the checkpoints that it asks to verify, until it ends.
    """

    def verify(saved: Checkpoint) -> None:
        control.broadcast([str(saved.path), saved.digest])
        _verify_share(saved, control)

    def act() -> T:
        try:
            return action(verify)
        finally:
            control.broadcast(None)  # tells the other ranks that there is nothing more to verify

    while control.rank and (asked := control.broadcast(None)) is not None:
        saved = None
        with contextlib.suppress(UserError):
            saved = Checkpoint(Path(asked[0]))
        with contextlib.suppress(UserError):  # rank 0 has it too, and decides what follows
            _verify_share(saved if saved is not None and saved.digest == asked[1] else None, control)
    return control.on_main(act)


def verify_together(path: Path, control: Control) -> Checkpoint:
    """The checkpoint at `path`, each byte of it verified by one process. Collective; a UserError of one is raised on all."""
    on_main(lambda verify: verify(Checkpoint(path)), control)
    return Checkpoint(path)


def verified(path: Path) -> Checkpoint:
    """The checkpoint at `path`, all of it verified by this process. UserError if it is damaged."""
    saved = Checkpoint(path)
    saved.verify()
    return saved


def _verify_share(saved: Checkpoint | None, control: Control) -> None:
    """Verify this process's share of the files. `saved` is None where this process does not see the checkpoint that rank 0
    sees: the others then take over its share. Collective."""
    ranks = range(control.processes)
    seeing = control.sum([float(rank == control.rank and saved is not None) for rank in ranks]).wait()
    helpers = [rank for rank in ranks if seeing[rank]]
    failure = None
    if saved is not None:
        try:
            saved.verify(slice(helpers.index(control.rank), None, len(helpers)))
        except UserError as error:
            failure = error
    control.raise_if_any(failure)
