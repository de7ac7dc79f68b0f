"""Where the processes of a launch find each other: torch's key-value store, and how it is opened."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.distributed.hosts import address_of_first
from trainer.errors import LOST, UserError, one_line

POLL_SECONDS = 0.2
BACKLOG = 4096  # as many ranks may connect at once


@dataclass(frozen=True)
class Rendezvous:
    """This process's place in its launch, and the store that all processes of it share."""

    rank: int
    processes: int
    store: Any
    restarted: bool = False
    """whether the launcher has started processes before; rank 0 knows"""


def meet(environ: Mapping[str, str], timeout: timedelta) -> Rendezvous | None:
    """Open the store that the launcher holds, or, where ranks were started by hand, rank 0; None for a process alone.

    UserError where it cannot be reached within `timeout`.
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
    holds_it = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listening = _listen(host, port) if holds_it else None
    end = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            # Tried first: torch's own attempts exceed a short time-out, and print a C++ stack each.
            socket.create_connection((host, port), max(1.0, end - time.monotonic())).close()
            break
        except OSError as error:
            if holds_it or time.monotonic() > end:
                raise UserError(
                    f"rank {rank}: no answer from {host}:{port}, where rank 0 or its launcher listens, within "
                    f"--timeout_minutes {timeout.total_seconds() / 60:g}; start it, and let this host connect to it "
                    f"({one_line(error)})",
                    LOST,
                ) from None
            time.sleep(POLL_SECONDS)
    store = dist.TCPStore(host, port, None, holds_it, timeout, wait_for_workers=False, master_listen_fd=listening)
    return Rendezvous(rank, processes, store)


def _listen(host: str, port: int) -> int:
    """A socket for rank 0's store: on the given address alone, or, if that is a name, on all interfaces, as torch does."""
    address = address_of_first(host)
    try:
        if address is None or not _is_ours(address):  # a name, or an address that something in between translates
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=BACKLOG).detach()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=BACKLOG).detach()
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} on {host}: {error.strerror}; give every rank another free port") from error


def _is_ours(address: str) -> bool:
    """Whether a socket can listen on it."""
    with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return True
    return False


def _number(environ: Mapping[str, str], name: str, default: str, least: int, most: int | None = None) -> int:
    text = environ.get(name) or default
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        what = f"{name} is {text}" if text else f"{name} is not set"
        raise UserError(f"{what}; give a whole number {bounds}, or start with accelerate launch or torchrun")
    return number
