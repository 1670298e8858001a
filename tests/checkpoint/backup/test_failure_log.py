"""Failures of backups and recoveries are recorded in the journal, once."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from small_backup import FILES, SETTINGS, link, read_at, save, settle, tags

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup import queue as backup_queue
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.queue import BackupQueue
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import epoch_tag, rolling_tag
from ds_gpt2.run_dir.journal import Event, Journal, read_journal


def events(run_dir: Path) -> list[Event]:
    return [event for event in read_journal(run_dir) if event.kind.startswith("backup_")]


def train(queue: BackupQueue, run_dir: Path, *steps: int) -> None:
    for step in steps:
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        settle(queue)


def open_queue(location: Path, run_dir: Path) -> BackupQueue:
    return BackupQueue(
        Backup(str(location), "run", SETTINGS), lambda: run_dir, reporter=BackupReporter(Journal(run_dir))
    )


def test_a_continuing_failure_is_one_event_and_so_is_the_recovery(run_dir: Path, tmp_path: Path) -> None:
    nas = tmp_path / "nas"
    queue = open_queue(nas, run_dir)
    train(queue, run_dir, 100, 200, 300)
    (failed,) = events(run_dir)
    assert failed.kind == "backup_failed"
    assert "no such directory (create it, or mount its disk)" in failed.text
    assert f"(backups go to {nas}/run)" in failed.text
    nas.mkdir()
    train(queue, run_dir, 400)
    recovered = events(run_dir)[-1]
    assert (recovered.kind, recovered.step) == ("backup_ok", 400)
    assert recovered.text.startswith("backups work again after ")
    assert read_at(str(nas), rolling_tag(400)).keys() == {*FILES, "manifest.json"}
    train(queue, run_dir, 500)
    assert len(events(run_dir)) == 2, "a success after a success is not recorded"
    shutil.rmtree(nas)
    train(queue, run_dir, 600)
    assert [event.kind for event in events(run_dir)] == ["backup_failed", "backup_ok", "backup_failed"]
    queue.finish(10)


@pytest.mark.parametrize(
    ("is_file", "reason"),
    [
        (False, "LOCATION: no such directory (create it, or mount its disk)"),
        (True, "LOCATION: not a directory (set checkpoint.backup.to to one)"),
    ],
)
def test_a_failed_copy_is_one_line_in_the_log(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_file: bool, reason: str
) -> None:
    nas = tmp_path / "nas"
    if is_file:
        nas.write_text("a file")
    queue = open_queue(nas, run_dir)
    settle(queue)
    reason = reason.replace("LOCATION", str(nas))
    assert caplog.messages == [f"backup: could not list the backups: {reason}; it is retried after the next checkpoint"]
    caplog.clear()
    train(queue, run_dir, 100)
    tag = rolling_tag(100)
    assert caplog.messages == [f"backup: could not copy {tag}: {reason}; it is retried after the next checkpoint"]
    queue.finish(10)


def test_a_continuing_failure_is_recorded_daily_with_its_start_also_after_restarts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_time = time.time()
    for hours in (0, 1, 23, 25, 26, 50):
        monkeypatch.setattr(time, "time", lambda hours=hours: start_time + 3600 * hours)
        BackupReporter(Journal(run_dir)).failed("no answer", 100)
    assert [(event.time - start_time) / 3600 for event in events(run_dir)] == [0, 25, 50]
    assert [event.facts["since"] for event in events(run_dir)] == [start_time] * 3
    BackupReporter(Journal(run_dir)).recovered("there it is", 200)
    assert events(run_dir)[-1].text == "backups work again after 2d 2h: there it is"
    BackupReporter(Journal(run_dir)).recovered("there it is", 300)
    assert len(events(run_dir)) == 4


def test_a_storage_that_cannot_delete_old_copies_counts_as_failing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nas").mkdir()
    queue = open_queue(tmp_path / "nas", run_dir)

    def refuse(self: Backup, step: int) -> list[str]:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Backup, "prune", refuse)
        train(queue, run_dir, 100, 200, 300)
    assert [event.kind for event in events(run_dir)] == ["backup_failed"]
    train(queue, run_dir, 400)
    assert [event.kind for event in events(run_dir)] == ["backup_failed", "backup_ok"]
    queue.finish(10)


def test_a_copy_without_progress_is_a_failure(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nas").mkdir()
    monkeypatch.setattr(backup_queue, "_STUCK_SECONDS", 0.2)
    answer = threading.Event()
    copy = Backup.copy

    def hang(self: Backup, *arguments: object) -> int:
        answer.wait(60)
        return copy(self, *arguments)  # type: ignore[arg-type]  # object stands for any argument

    monkeypatch.setattr(Backup, "copy", hang)
    queue = open_queue(tmp_path / "nas", run_dir)
    save(run_dir, 100)
    queue.offer(rolling_tag(100), [], 100)
    time.sleep(0.5)
    save(run_dir, 200)
    queue.offer(rolling_tag(200), [], 200)
    (reported,) = [event.text for event in events(run_dir)]
    assert reported.startswith(f"a backup to {tmp_path}/nas/run has made no progress for ")
    answer.set()
    settle(queue)
    assert [event.kind for event in events(run_dir)] == ["backup_failed", "backup_ok"]
    queue.finish(10)


def test_an_epoch_that_retention_has_deleted_is_not_copied_later(run_dir: Path, tmp_path: Path) -> None:
    nas = tmp_path / "nas"
    queue = open_queue(nas, run_dir)
    save(run_dir, 100)
    link(run_dir, rolling_tag(100), epoch_tag(1))
    queue.offer(rolling_tag(100), [epoch_tag(1)], 100)
    settle(queue)
    commit.remove(Disk(), run_dir, epoch_tag(1))
    nas.mkdir()
    train(queue, run_dir, 200)
    assert [event.kind for event in events(run_dir)] == ["backup_failed", "backup_ok"]
    assert queue.finish(10) == []
    assert tags(Backup(str(nas), "run", SETTINGS)) == [rolling_tag(200)]


# The probe of `doctor`


@pytest.mark.parametrize("has_copies", [False, True])
def test_a_probe_deletes_its_files(run_dir: Path, tmp_path: Path, memory: MemoryFileSystem, has_copies: bool) -> None:
    (tmp_path / "nas").mkdir()
    generation = save(run_dir, 100)
    for location in (str(tmp_path / "nas"), "memory://nas"):
        backup = Backup(location, "run", SETTINGS)
        if has_copies:
            backup.copy(generation)
        before = fsspec.url_to_fs(location)[0].find(fsspec.url_to_fs(location)[1], withdirs=True)
        backup.probe()
        assert fsspec.url_to_fs(location)[0].find(fsspec.url_to_fs(location)[1], withdirs=True) == before


def test_a_probe_detects_failures(tmp_path: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no such directory"):
        Backup(str(tmp_path / "nas"), "run", SETTINGS).probe()
    assert not (tmp_path / "nas").exists()
    backup = Backup("memory://nas", "run", SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "rm_file", lambda self, path: None)
        with pytest.raises(OSError, match="a deleted file still exists"):
            backup.probe()
    MemoryFileSystem.store.clear()
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "write", lambda self, data: len(data))
        with pytest.raises(OSError, match="does not read back as it was written"):
            backup.probe()
    assert MemoryFileSystem.store == {}


def test_keys_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"key": "me-and-my-key", "secret": "swordfish", "client": {"token": "tttttt"}}
    )
    error = OSError(
        "Signature of hunter2hunter2 for me-and-my-key with swordfish and tttttt at http://me:pass@host/ is wrong"
    )
    assert redacted_reason(error) == "Signature of *** for *** with *** and *** at http://***@host/ is wrong"


def test_a_read_only_storage_is_reported_before_the_first_copy_is_due(
    run_dir: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: MemoryFile, data: bytes) -> int:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(MemoryFile, "write", refuse)
    queue = BackupQueue(
        Backup("memory://nas", "run", SETTINGS), lambda: run_dir, reporter=BackupReporter(Journal(run_dir))
    )
    deadline = time.monotonic() + 20
    while not events(run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    (failed,) = events(run_dir)
    assert failed.text == "could not write a test file: 403 Forbidden (backups go to memory://nas/run)"
    queue.finish(10)
