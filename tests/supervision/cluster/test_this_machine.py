"""Which names of hosts are names of this machine."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from ds_gpt2.supervision.cluster.this_machine import is_this_machine


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_name_that_resolves_to_a_loopback_address_is_this_machine(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Debian's installer writes 127.0.1.1 for the host's own name."""

    def resolve(name: str, port: object) -> list[tuple[Any, ...]]:
        assert name == "host-a.lab"
        return [(None, None, None, None, (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert is_this_machine("host-a.lab") and is_this_machine("root@host-a.lab")


@pytest.mark.parametrize("error", [OSError("unknown"), UnicodeError("label too long")])
def test_a_name_that_cannot_be_resolved_is_not_this_machine(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def resolve(name: str, port: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert not is_this_machine("host-b")
    assert is_this_machine(socket.gethostname()) and is_this_machine(f"root@{socket.gethostname()}")
