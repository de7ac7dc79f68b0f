"""The network interface that gloo, and so the control group, listens on."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737), so the route to it is the default route; nothing is sent there


def choose_interface(environ: MutableMapping[str, str]) -> str | None:
    """Set GLOO_SOCKET_IFNAME where gloo's own choice would be unreachable or needlessly open; return what is set, or None.

    Where MASTER_ADDR is a loopback address, all processes are on this host, and gloo listens on loopback alone.

    On several hosts gloo announces the address that this host's own name resolves to. On Debian, and in many containers, that
    is loopback: the other hosts cannot connect to it, on GPUs either, and wait until their time-out. Then the interface is the
    one on the route to the first host; on the first host itself, whose own name is loopback, the one of the default route.
    """
    if "GLOO_SOCKET_IFNAME" in environ or int(environ.get("WORLD_SIZE") or 1) == 1:
        return None
    interface = _interface_for(environ)
    if interface is not None:
        environ["GLOO_SOCKET_IFNAME"] = interface
    return interface


def _interface_for(environ: Mapping[str, str]) -> str | None:
    """The interface for a launch of several processes; None to leave the choice to gloo."""
    master = environ.get("MASTER_ADDR", "")
    first = literal_address(master)
    if first is not None and _is_loopback(first):
        return _interface_with(first)
    one_host = int(environ["WORLD_SIZE"]) <= int(environ.get("LOCAL_WORLD_SIZE") or 1)
    if one_host or not _is_loopback(_address_of(socket.gethostname())):
        return None
    for target in filter(None, (_address_of(master), OUTSIDE)):
        source = _source_towards(target)
        if not _is_loopback(source) and (interface := _interface_with(source)):
            return interface
    return None


def literal_address(host: str) -> str | None:
    """`host` if it is an IP address, or 127.0.0.1 for `localhost`; None for other names, which may resolve differently on each
    host."""
    with suppress(ValueError):
        return str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
    return None


def _address_of(host: str) -> str | None:
    """The first address that a name resolves to, or None."""
    with suppress(OSError, UnicodeError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0]) if host else None
    return None


def _source_towards(address: str) -> str | None:
    """This host's own address on the route to `address`, or None. Connecting a datagram socket sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]
    return None


def _is_loopback(address: str | None) -> bool:
    """Whether other hosts cannot reach this address. True for None, a name that does not resolve: gloo then takes loopback."""
    return address is None or ipaddress.ip_address(address).is_loopback


def _interface_with(address: str | None) -> str | None:
    """The name of the network interface that has this address, or None."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if address in {a.address for a in addresses}), None)
