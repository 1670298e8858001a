"""What an agent finds out about its host."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster import link_speed, node_checks
from ds_gpt2.supervision.cluster.keyed_connections import Listener


def test_addresses_are_tried_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Listener.connect

    def connect_slowly(self: Listener, address: str) -> socket.socket:
        if address != "127.0.0.1":
            time.sleep(0.5)
            raise TimeoutError
        return connect(self, address)

    monkeypatch.setattr(Listener, "connect", connect_slowly)
    start_time = time.monotonic()
    found = node_checks.reach([*(f"10.0.0.{number}" for number in range(12)), "127.0.0.1"], node_checks.listen())
    assert time.monotonic() - start_time < 3
    assert list(found) == ["127.0.0.1"]
    assert found["127.0.0.1"]["interface"] == "lo" and 0 < found["127.0.0.1"]["round_trip"] < 1
    assert node_checks.reach([], node_checks.listen()) == {}


@pytest.mark.parametrize("action", [node_checks.listen, link_speed.send_stream])
def test_only_programs_with_the_key_are_answered(action: Callable[[], dict[str, Any]]) -> None:
    listener = Listener(**action())
    with Listener(listener.port, "00" * 16).connect("127.0.0.1") as stranger:
        stranger.sendall(b"x")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = stranger.recv(1)
        assert answer == b""
    with listener.connect("127.0.0.1") as known:
        known.sendall(b"x")
        assert len(known.recv(1)) == 1


def test_gpus_are_counted_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_checks._count_gpus() == torch.cuda.device_count()
    monkeypatch.setattr(node_checks, "_COUNT_GPUS", "import no_such_module")
    with pytest.raises(UserError, match=r"^PyTorch cannot count the GPUs: ModuleNotFoundError: .*no_such_module'$"):
        node_checks._count_gpus()
