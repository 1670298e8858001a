"""Choose the network interface of the connections between ranks on several machines.

By default gloo and NCCL use an address that the machine's own name resolves to. On Debian that is 127.0.1.1, which
other machines cannot reach, and in a container the name may not resolve at all.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, MutableMapping

import psutil

from ds_gpt2.distributed.launch_environment import LOOPBACK

_OUTSIDE = "192.0.2.1"  # reserved for documentation, RFC 5737: the default route leads there
_PORT = 9  # any: nothing is sent


def variables_of(interface: str) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use ``interface``."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}  # =: not only as a prefix


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make gloo and NCCL use the interface that leads to rank 0, unless the user has chosen one.

    Call it on a rank, after ``launch_environment.adopt``. It changes nothing on a single machine, or if no interface
    can be determined.
    """
    is_one_machine = int(environment["WORLD_SIZE"]) <= int(environment["LOCAL_WORLD_SIZE"])
    if is_one_machine or any(environment.get(name) for name in variables_of("")):
        return
    interface = interface_to(environment["MASTER_ADDR"])
    if interface is not None:
        environment.update(variables_of(interface))


def interface_to(address: str) -> str | None:
    """Return the interface that leads to a host name or an address; None for the loopback interface or if unknown.

    If a name resolves to this machine's loopback interface, the interface that leads to other machines is returned.
    """
    if address in LOOPBACK:
        return None
    own = _own_address(address)
    if own is not None and ipaddress.ip_address(own).is_loopback:
        return _interface_to_others()
    return None if own is None else interface_of(own)


def interface_of(address: str) -> str | None:
    """Return the interface of this machine that has ``address``; None if none has it."""
    return next((name for name, found in addresses().items() if address in found), None)


def addresses(families: Iterable[int] = (socket.AF_INET, socket.AF_INET6)) -> dict[str, list[str]]:
    """Return the addresses of each network interface that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: [_without_scope(each.address) for each in found if each.family in families]
        for name, found in psutil.net_if_addrs().items()
        if name in up
    }


def _interface_to_others() -> str | None:
    """Return the interface of the default route, or else the only one that has an address besides loopback."""
    own = _own_address(_OUTSIDE)
    if own is not None:
        return interface_of(own)
    reachable = [
        name
        for name, found in addresses().items()
        if any(not (ip := ipaddress.ip_address(each)).is_loopback and not ip.is_link_local for each in found)
    ]
    return reachable[0] if len(reachable) == 1 else None


def _own_address(address: str) -> str | None:
    """Return this machine's address of a connection to ``address``; None if there is no route."""
    try:
        found = socket.getaddrinfo(address, _PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None  # the rendezvous reports it
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram socket: chooses a route, sends nothing
                return _without_scope(str(probe.getsockname()[0]))
        except OSError:
            continue
    return None


def _without_scope(address: str) -> str:
    return address.partition("%")[0]  # of an IPv6 address: fe80::1%eth0
