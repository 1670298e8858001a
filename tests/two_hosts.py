"""Two hosts on this machine for a test, and the settings of a small run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from small_run import MODEL

from benchmarks.host_pair import Host, TwoHosts, problem

__all__ = ["Host", "TwoHosts", "small_run", "two_hosts"]


def small_run(folder: Path, steps: int, every: int, **sections: object) -> dict[str, object]:
    """Return the settings of a small run on two hosts with two ranks each.

    Args:
        every: steps between two checkpoints.
        sections: replace or add whole sections.
    """
    usual: dict[str, object] = {
        "model": MODEL,
        "batch": {"tokens_per_step": 512, "micro_batch": 2, "sequence_length": 64},
        "schedule": {"steps": steps, "warmup_steps": min(3, steps - 1), "max_lr": 3e-3, "min_lr": 3e-4},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": every, "min_free_gb": 0.0},
        "validation": {"every": 0},
        "samples": {"every": 0},
        "supervisor": {"backoff_seconds": 0.5, "stop_seconds": 30},
    }
    return {**usual, **sections}


@contextlib.contextmanager
def two_hosts(folder: Path, number: int = 0, names: Mapping[str, str] | None = None) -> Iterator[TwoHosts]:
    """Make two hosts, and remove them at the end. The test is skipped if that is not possible here."""
    if (reason := problem()) is not None:
        pytest.skip(reason)
    hosts = TwoHosts(folder, number)
    try:
        hosts.start(names)
        yield hosts
    finally:
        hosts.stop()
