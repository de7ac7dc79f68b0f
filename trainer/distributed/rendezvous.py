"""Opens torch's key-value store, over which the processes of a launch find each other."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.distributed.hosts import literal_address
from trainer.errors import LOST, UserError, one_line

POLL_SECONDS = 0.2
BACKLOG = 4096  # ranks that may connect at the same moment


@dataclass(frozen=True)
class Rendezvous:
    """This process's rank in its launch, and the key-value store that all its processes share."""

    rank: int
    processes: int
    store: Any
    restarted: bool = False
    """whether the launcher has started these processes before; only rank 0 knows, False elsewhere"""


def meet(environ: Mapping[str, str], timeout: timedelta) -> Rendezvous | None:
    """Open the launch's store, which torchrun's agent serves, or rank 0 where nobody else does. None for a single process.

    UserError for wrong variables of the launch, or if the store cannot be reached within `timeout`.
    """
    processes = _number(environ, "WORLD_SIZE", "1", 1)
    if processes == 1:
        return None
    rank, port = _number(environ, "RANK", "", 0, processes - 1), _number(environ, "MASTER_PORT", "", 1, 65535)
    host = environ.get("MASTER_ADDR")
    if not host:
        raise UserError(
            "MASTER_ADDR is not set: the address of rank 0; set it (mpirun -x MASTER_ADDR=HOST), or start with torchrun"
        )
    serves = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listening = _listen(host, port) if serves else None
    end = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            # A plain connection first: torch's own attempts overrun a short time-out, and each prints a C++ stack.
            socket.create_connection((host, port), max(1.0, end - time.monotonic())).close()
            break
        except OSError as error:
            if serves or time.monotonic() > end:
                raise UserError(
                    f"rank {rank}: no answer from {host}:{port}, where rank 0 or its launcher listens, within "
                    f"--timeout_minutes {timeout.total_seconds() / 60:g}; start it, and let this host connect to it "
                    f"({one_line(error)})",
                    LOST,
                ) from None
            time.sleep(POLL_SECONDS)
    store = dist.TCPStore(host, port, None, serves, timeout, wait_for_workers=False, master_listen_fd=listening)
    return Rendezvous(rank, processes, store)


def _listen(host: str, port: int) -> int:
    """The descriptor of a listening socket for rank 0's store: on `host` alone if that is an address of this machine, else on
    all interfaces, as torch does. UserError if the port is taken."""
    address = literal_address(host)
    try:
        if address is None or not _is_ours(address):  # a name, or an address that a router translates to ours
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=BACKLOG).detach()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=BACKLOG).detach()
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} on {host}: {error.strerror}; give every rank another free port") from error


def _is_ours(address: str) -> bool:
    """Whether a socket of this machine can be bound to the address."""
    with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return True
    return False


def _number(environ: Mapping[str, str], name: str, default: str, least: int, most: int | None = None) -> int:
    """A variable as a whole number from `least` to `most`; UserError for anything else, or if it is missing with no default."""
    text = environ.get(name) or default
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        what = f"{name} is {text}" if text else f"{name} is not set"
        raise UserError(f"{what}; give a whole number {bounds}, or start with accelerate launch or torchrun")
    return number
