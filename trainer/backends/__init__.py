"""One file for each way of spreading a model over processes, behind one contract (`backend.Backend`)."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.backends.backend import Backend
from trainer.backends.plain import PlainBackend
from trainer.backends.zero import ZeroBackend
from trainer.errors import UserError, path_of

UNSUPPORTED = ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def backend_of(environ: Mapping[str, str]) -> type[Backend]:
    """The backend that the launcher asked for; a new one is a file here and an entry in this list.

    UserError for a launch that no backend is for, rather than another one without a word.
    """
    for name in UNSUPPORTED:
        if environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher asks for {name}, which is not supported; use {path_of('accelerate_configs/zero3.yaml')}"
            )
    return next(backend for backend in (ZeroBackend, PlainBackend) if backend.requested(environ))
