"""Worker processes that tokenize."""

from __future__ import annotations

import itertools
from pathlib import Path

import psutil
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.worker_pool import Encoder, _Worker


def test_a_worker_killed_while_it_writes_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker leaves half of a message; the other worker must not hold its pipe open."""
    killed, other = _Worker(), _Worker()
    try:
        killed._pipe.send(["word " * 1_000_000])  # more tokens than the buffer of a pipe holds
        assert killed._pipe.poll(60)
        killed.kill()
        monkeypatch.setattr(type(killed._pipe), "send", lambda pipe, texts: None)
        with pytest.raises(UserError, match="a worker was killed"):
            killed.encode([])
    finally:
        monkeypatch.undo()
        other.kill()
    with pytest.raises(UserError, match="a worker was killed"):
        other.encode(["text"])


def test_the_encoder_ends_its_workers(tmp_path: Path) -> None:
    with Encoder(2) as encoder:
        texts = ((f"text {number} " * 20_000, number) for number in itertools.count())
        assert [number for number, _ in itertools.islice(encoder.encode(texts), 3)] == [0, 1, 2]
    assert psutil.Process().children() == [] or not any(
        "spawn_main" in " ".join(child.cmdline()) for child in psutil.Process().children()
    )
