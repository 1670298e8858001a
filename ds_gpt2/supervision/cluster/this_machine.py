"""Whether the name of a host is one of this machine."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from ds_gpt2.distributed.launch_environment import LOOPBACK


def is_this_machine(host: str) -> bool:
    """Return whether ``host``, a name or an address as ssh takes it, is this machine."""
    name = host.rpartition("@")[2]  # without the name of a user
    if name in (*LOOPBACK, socket.gethostname()):
        return True
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):  # a name that is not known, or cannot be one
        return False
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in found)
