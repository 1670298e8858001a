"""Fixtures of the tests of backups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_backup import MEMORY, Gate, clear_memory


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory ``checkpoints/<run>/``."""
    path = tmp_path / "checkpoints" / "run"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An empty memory file system."""
    clear_memory()
    yield MemoryFileSystem()
    clear_memory()


@pytest.fixture
def local_location(tmp_path: Path) -> Path:
    """A local directory for copies."""
    (tmp_path / "nas").mkdir()
    return tmp_path / "nas"


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, local_location: Path, memory: MemoryFileSystem) -> str:
    """The URL of a location for copies, of both kinds."""
    return str(local_location) if request.param == "local" else MEMORY


@pytest.fixture
def gate(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A closed gate before all writes to the memory file system."""
    return Gate(monkeypatch)
