"""A supervisor whose disks cannot be read for some time, as after a restart of a file server."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.supervision import disk_watch, run_directories
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.disk_watch import DiskWatch
from ds_gpt2.supervision.stop_signals import StopSignals
from ds_gpt2.supervision.waiting import wait_for_checkpoints


@pytest.fixture
def context(tmp_path: Path, write_config: Callable[..., Path]) -> Context:
    settings = load_settings(write_config(tmp_path, supervisor={"backoff_seconds": 0}))
    settings.run_dir.mkdir(parents=True)
    return Context(settings, StopSignals(), ranks=2)


def _stale(*arguments: object) -> NoReturn:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_the_supervisor_waits_for_checkpoints_that_cannot_be_read(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def scan(directory: Path) -> list[Generation]:
        calls.append(directory)
        if len(calls) < 3:
            _stale()
        return []

    monkeypatch.setattr(catalog, "scan", scan)
    assert wait_for_checkpoints(context, "auto")
    (event,) = (event for event in read_journal(context.settings.run_dir) if event.kind == "no_checkpoints")
    assert event.text == (
        f"{context.settings.checkpoint_dir} cannot be read (Stale file handle); waiting for the checkpoints"
    )


def test_the_saved_step_is_the_last_known_one(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert context.directories.saved_step() == -1
    monkeypatch.setattr(run_directories, "newest_step", lambda directory: 40)
    assert context.directories.saved_step() == 40
    monkeypatch.setattr(run_directories, "newest_step", _stale)
    assert context.directories.saved_step() == 40


def test_a_check_of_the_disk_space_does_not_end_the_supervisor(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_watch, "newest_full_bytes", _stale)
    assert DiskWatch(context.settings, free_bytes=lambda: 1 << 40).check() is None


def test_a_journal_that_cannot_be_read_has_no_events(context: Context) -> None:
    (context.settings.run_dir / "journal.jsonl").mkdir()  # an OSError other than FileNotFoundError
    assert context.reporter.events_since(0) == []


def test_an_empty_directory_named_stop_is_a_request(context: Context) -> None:
    stop = context.settings.run_dir / "STOP"
    stop.mkdir()
    assert context.directories.take_stop_file()
    assert not stop.exists() and not context.directories.take_stop_file()
