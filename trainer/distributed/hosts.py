"""Several hosts: the network interface that gloo, and with it the control group, listens on."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import MutableMapping
from contextlib import suppress

OUTSIDE = "192.0.2.1"  # nobody's address (RFC 5737): the way to it is the default route, and no packet is sent


def choose_interface(environ: MutableMapping[str, str]) -> str | None:
    """Set GLOO_SOCKET_IFNAME where gloo would choose an interface that does not do, or is not needed; it, or None.

    Of a launch on one host that says so (MASTER_ADDR is a loopback address) gloo listens on loopback alone.

    On several hosts gloo tells the other processes the address that this host's own name stands for. On Debian, and in many
    containers, that is loopback: the connection is refused there, on GPUs too, and the peer waits until its time-out. What
    leads to the first host is reachable from it; the first host itself, if it knows its own name as loopback, takes its
    default route.
    """
    if "GLOO_SOCKET_IFNAME" in environ or int(environ.get("WORLD_SIZE") or 1) == 1:
        return None
    first = address_of_first(environ.get("MASTER_ADDR", ""))
    if first is not None and _is_loopback(first):
        interface = _interface_with(first)
        if interface:
            environ["GLOO_SOCKET_IFNAME"] = interface
        return interface
    several = int(environ.get("WORLD_SIZE") or 1) > int(environ.get("LOCAL_WORLD_SIZE") or 1)
    if not several or not _is_loopback(_address_of(socket.gethostname())):
        return None
    for target in (_address_of(environ.get("MASTER_ADDR", "")), OUTSIDE):
        source = target and _source_towards(target)
        interface = None if _is_loopback(source) else _interface_with(source)
        if interface:
            environ["GLOO_SOCKET_IFNAME"] = interface
            return interface
    return None  # loopback is all there is


def address_of_first(host: str) -> str | None:
    """MASTER_ADDR where it is an address, or `localhost`; None for a name, which may mean another address on each host."""
    with suppress(ValueError):
        return str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
    return None


def _address_of(host: str) -> str | None:
    with suppress(OSError, UnicodeError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0]) if host else None
    return None


def _source_towards(address: str) -> str | None:
    """Our own address on the way to another one, from the routing table: connecting a datagram socket sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]
    return None


def _is_loopback(address: str | None) -> bool:
    """Whether nobody else can reach this address; None, a name that stands for nothing, makes gloo take loopback."""
    return address is None or ipaddress.ip_address(address).is_loopback


def _interface_with(address: str | None) -> str | None:
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if address in {a.address for a in addresses}), None)
