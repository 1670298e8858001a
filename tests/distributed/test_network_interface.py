"""The network interface that gloo and NCCL use between ranks on several machines."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import SimpleNamespace

import psutil
import pytest

from ds_gpt2.distributed import network_interface
from ds_gpt2.distributed.network_interface import choose, interface_of, interface_to

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "192.168.3.7"}
ROUTES = {  # to -> this machine's own address of the connection
    "10.0.0.1": "10.0.0.7",
    "node1": "10.0.0.7",
    "node1-ib": "192.168.3.7",
    "10.0.0.7": "10.0.0.7",  # rank 0 is here
    "debian": "127.0.0.1",  # its own name, which resolves to 127.0.1.1
    "behind-nat": "172.16.0.9",  # no interface has it any more
}
RANK = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace this machine's interfaces and routes; return the routes, which a test may change."""
    found = dict(ROUTES)

    def interfaces() -> dict[str, list[SimpleNamespace]]:
        mac = SimpleNamespace(family=psutil.AF_LINK, address="02:42:ac:11:00:02")
        return {
            name: [SimpleNamespace(family=socket.AF_INET, address=address), mac] for name, address in INTERFACES.items()
        } | {"down0": [SimpleNamespace(family=socket.AF_INET, address="10.9.9.9")]}

    states = {name: SimpleNamespace(isup=name != "down0") for name in (*INTERFACES, "down0")}
    monkeypatch.setattr(psutil, "net_if_addrs", interfaces)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    monkeypatch.setattr(network_interface, "_own_address", found.get)
    return found


@pytest.mark.parametrize(
    ("master", "interface"),
    [
        ("10.0.0.1", "eth0"),
        ("node1", "eth0"),
        ("node1-ib", "ib0"),
        ("10.0.0.7", "eth0"),
        ("unknown", None),
        ("behind-nat", None),
        ("127.0.0.1", None),
        ("localhost", None),
    ],
)
def test_the_interface_is_the_one_that_leads_to_rank_0(
    routes: Mapping[str, str], master: str, interface: str | None
) -> None:
    environment = RANK | {"MASTER_ADDR": master}
    choose(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == interface
    assert environment.get("NCCL_SOCKET_IFNAME") == (f"={interface}" if interface else None)


def test_a_name_that_resolves_to_the_loopback_interface_stands_for_the_interface_of_the_default_route(
    routes: dict[str, str],
) -> None:
    assert interface_to("debian") is None  # there is no default route, and two interfaces
    routes["192.0.2.1"] = "192.168.3.7"
    assert interface_to("debian") == "ib0"


def test_without_a_default_route_the_only_interface_is_used(
    routes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(INTERFACES, "ib0")
    assert interface_to("debian") == "eth0"


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_a_choice_of_the_user_is_kept(routes: Mapping[str, str], name: str) -> None:
    environment = RANK | {"MASTER_ADDR": "node1", name: "ib0"}
    before = dict(environment)
    choose(environment)
    assert environment == before


def test_nothing_is_chosen_on_one_machine(routes: Mapping[str, str]) -> None:
    environment = RANK | {"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "4"}
    before = dict(environment)
    choose(environment)
    assert environment == before


def test_the_addresses_of_this_machine_lead_to_their_interfaces() -> None:
    found = {
        address: name
        for name, each in network_interface.addresses([socket.AF_INET]).items()
        for address in each
        if not address.startswith("127.")
    }
    if not found:
        pytest.skip("this machine has no address besides that of the loopback interface")
    assert {interface_to(address) for address in found} == {interface_of(address) for address in found}
    assert interface_to("name.invalid") is None
