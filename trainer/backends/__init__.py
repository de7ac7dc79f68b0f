"""One file for each way of spreading a model over processes, behind one contract (`backend.Backend`)."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.backends.backend import Backend
from trainer.backends.fsdp import FSDP, FsdpBackend
from trainer.backends.plain import PlainBackend
from trainer.backends.zero import ZeroBackend
from trainer.distributed.launch import switched_on
from trainer.errors import UserError, path_of

SWITCHES = ("CPU", "DEEPSPEED", "FSDP", "PARALLELISM_CONFIG", "SAGEMAKER")
"""the X of the ACCELERATE_USE_X variables that a backend here understands, or that change nothing"""


def backend_of(environ: Mapping[str, str]) -> type[Backend]:
    """The backend that the launcher asked for, by its environment variables. UserError if there is none for it.

    A new backend is a file in this folder and an entry in the tuple below.
    """
    prefix, sizes = "ACCELERATE_USE_", "PARALLELISM_CONFIG_{}_SIZE"
    on = [key.removeprefix(prefix) for key in environ if key.startswith(prefix) and switched_on(environ, key)]
    unknown = [name for name in on if name not in SWITCHES]
    if "PARALLELISM_CONFIG" in on:
        unknown += [kind for kind in ("TP", "CP", "SP") if (environ.get(sizes.format(kind)) or "1") != "1"]
        unknown += [] if "FSDP" in on else ["PARALLELISM_CONFIG without FSDP"]
    if environ.get("PJRT_DEVICE", "").upper() == "TPU":
        unknown.append("TPU")
    if unknown:
        raise UserError(f"the launcher asks for {unknown[0]}, which is not supported; use {path_of(FSDP)}")
    return next(backend for backend in (ZeroBackend, FsdpBackend, PlainBackend) if backend.requested(environ))
