"""The interface that is set for gloo. test_two_hosts.py shows that it works; here are the hosts where none may be set."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import psutil
import pytest

from trainer.distributed import hosts

Address = namedtuple("Address", "address")
SEVERAL = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first"}
NAMES = {"first": "10.0.0.1", "me": "127.0.1.1"}
OURS = {"10.0.0.1": "10.0.0.2", "127.0.1.1": "127.0.0.1", hosts.OUTSIDE: "172.16.0.2"}

Network = Callable[..., None]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """This host is called `me`, and has an address towards each of a few others."""

    def become(names: dict[str, str], ours: dict[str, str]) -> None:
        monkeypatch.setattr(hosts.socket, "gethostname", lambda: "me")
        monkeypatch.setattr(hosts, "_address_of", names.get)
        monkeypatch.setattr(hosts, "_source_towards", ours.get)
        interfaces = {"lo": [Address("127.0.0.1")], "eth0": [Address("172.16.0.2")], "ib0": [Address("10.0.0.2")]}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)

    become(NAMES, OURS)
    return become


def test_it_takes_the_way_to_the_first_host(network: Network) -> None:
    environ = dict(SEVERAL)
    assert hosts.choose_interface(environ) == "ib0"
    assert environ == {**SEVERAL, "GLOO_SOCKET_IFNAME": "ib0"}


def test_the_first_host_that_knows_itself_as_loopback_takes_its_default_route(network: Network) -> None:
    network({"first": "127.0.1.1", "me": "127.0.1.1"}, OURS)
    assert hosts.choose_interface(dict(SEVERAL)) == "eth0"


def test_a_name_that_stands_for_nothing_is_loopback_too(network: Network) -> None:
    network({"first": "10.0.0.1"}, OURS)  # gloo falls back to it
    assert hosts.choose_interface(dict(SEVERAL)) == "ib0"


@pytest.mark.parametrize("first", ["127.0.0.1", "localhost"])
def test_a_launch_on_loopback_listens_there_alone(network: Network, first: str) -> None:
    network({"me": "172.16.0.2"}, OURS)
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": first}
    assert hosts.choose_interface(environ) == environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert hosts.choose_interface({"MASTER_ADDR": first}) is None


@pytest.mark.parametrize(
    "environ",
    [{}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first"}, {**SEVERAL, "GLOO_SOCKET_IFNAME": "mine"}],
    ids=["no launcher", "one host", "chosen by the user"],
)
def test_it_leaves_other_launches_alone(network: Network, environ: dict[str, str]) -> None:
    before = dict(environ)
    assert hosts.choose_interface(environ) is None
    assert environ == before


@pytest.mark.parametrize(
    ("names", "ours"),
    [({"first": "10.0.0.1", "me": "10.0.0.2"}, OURS), (NAMES, {}), (NAMES, {"10.0.0.1": "10.9.9.9"})],
    ids=["the name is reachable", "no route", "an address of no interface"],
)
def test_it_leaves_hosts_alone_where_it_knows_nothing_better(network: Network, names: dict, ours: dict) -> None:
    network(names, ours)
    environ = dict(SEVERAL)
    assert hosts.choose_interface(environ) is None
    assert environ == SEVERAL


def test_the_real_routing_table_gives_loopback_for_loopback() -> None:
    assert hosts._source_towards("127.0.0.1") == "127.0.0.1"
    assert hosts._interface_with("127.0.0.1")
    assert hosts._address_of("localhost") in ("127.0.0.1", "::1")
    assert hosts._address_of("no-such-host.invalid") is None
