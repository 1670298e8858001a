"""Copies in the background of a training process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_backup import (
    SETTINGS,
    Gate,
    changed_settings,
    link,
    read_at,
    read_in,
    save,
    settle,
    tags,
)

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.queue import BackupQueue
from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import BEST_TAG, COPYING, MANIFEST, epoch_tag, rolling_tag


def test_the_queue_copies_due_checkpoints_and_prunes(
    run_dir: Path, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ds_gpt2")
    backup = Backup(location, "run", SETTINGS)
    queue = BackupQueue(backup, lambda: run_dir)
    for step in (100, 150, 200, 300):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        settle(queue)
    link(run_dir, rolling_tag(300), epoch_tag(1))
    queue.offer(rolling_tag(350), [epoch_tag(1)], 350)
    assert queue.finish(60) == []
    assert set(tags(backup)) == {rolling_tag(200), rolling_tag(300), epoch_tag(1)}
    assert "rolling_step_000300 is in " in caplog.text and "3,000 bytes" in caplog.text
    assert not (run_dir / COPYING).exists()


def test_the_last_checkpoint_of_a_run_is_copied_regardless_of_the_intervals(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", changed_settings(roles=("latest", "best"), every=1000, best_every_hours=100.0))
    queue = BackupQueue(backup, lambda: run_dir)
    for step in (100, 150, 200):
        save(run_dir, step)
        link(run_dir, rolling_tag(step), "best_model")
        queue.offer(rolling_tag(step), ["best_model"], step)
        settle(queue)
    assert {copy.tag: copy.manifest.step for copy in backup.copies()} == {rolling_tag(100): 100, "best_model": 100}
    queue.offer_last(rolling_tag(200), 200)
    assert queue.finish(60) == []
    held = {copy.tag: copy.manifest.step for copy in backup.copies()}
    assert held == {rolling_tag(100): 100, rolling_tag(200): 200, "best_model": 200}


def test_retention_may_delete_a_checkpoint_that_is_being_copied(run_dir: Path, gate: Gate) -> None:
    generation = save(run_dir, 100)
    whole = read_in(generation.path)
    queue = BackupQueue(Backup("memory://nas", "run", SETTINGS), lambda: run_dir)
    queue.offer(generation.tag, [], 100)
    assert gate.reached.wait(60)
    commit.remove(Disk(), run_dir, generation.tag)
    gate.open.set()
    assert queue.finish(60) == []
    assert read_at("memory://nas", generation.tag) == whole


def test_a_slow_storage_gets_only_the_newest_checkpoint(run_dir: Path, gate: Gate) -> None:
    backup = Backup("memory://nas", "run", SETTINGS)
    queue = BackupQueue(backup, lambda: run_dir)
    for step in (100, 200, 300, 400):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        assert gate.reached.wait(60)
    assert {path.name for path in (run_dir / COPYING).iterdir()} == {rolling_tag(100), rolling_tag(400)}
    gate.open.set()
    assert queue.finish(60) == []
    assert tags(backup) == [rolling_tag(400), rolling_tag(100)]


def test_a_best_checkpoint_is_not_replaced_while_it_is_copied(run_dir: Path, gate: Gate) -> None:
    backup = Backup("memory://nas", "run", changed_settings(roles=("best",), best_every_hours=0.0))
    queue = BackupQueue(backup, lambda: run_dir)
    for step in (100, 110):
        save(run_dir, step, seed=step)
        link(run_dir, rolling_tag(step), BEST_TAG)
        queue.offer(rolling_tag(step), [BEST_TAG], step)
        assert gate.reached.wait(60)
    gate.open.set()
    settle(queue)
    assert [copy.manifest.step for copy in backup.copies()] == [100]
    save(run_dir, 120)
    queue.offer(rolling_tag(120), [], 120)
    assert queue.finish(60) == []
    assert [(copy.tag, copy.manifest.step) for copy in backup.copies()] == [(BEST_TAG, 110)]


def test_a_slow_copy_does_not_delay_the_end_of_a_run(run_dir: Path, gate: Gate, log_messages: list[str]) -> None:
    queue = BackupQueue(Backup("memory://nas", "run", SETTINGS), lambda: run_dir)
    for step in (100, 200):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
    assert gate.reached.wait(60)
    assert queue.finish(0.05) == [rolling_tag(100), rolling_tag(200)]
    text = "rolling_step_000100, rolling_step_000200 not in memory://nas/run; `./launch.sh backup`"
    assert any(text in message for message in log_messages)
    queue.offer(rolling_tag(200), [epoch_tag(1)], 200)  # too late: nothing happens
    gate.open.set()
    queue._thread.shutdown(wait=True)
    assert MANIFEST not in read_at("memory://nas", rolling_tag(100))
    assert not (run_dir / COPYING).exists()


@pytest.mark.parametrize(
    "error", [OSError("connection to ftp://me:hunter2@nas lost"), RuntimeError("hunter3?"), MemoryError()]
)
def test_each_failed_copy_is_logged_once_and_retried(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    MemoryFileSystem.store.clear()
    backup = Backup("memory://nas", "run", changed_settings(roles=("epoch",)))
    queue = BackupQueue(backup, lambda: run_dir)
    settle(queue)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", lambda *args, **kwargs: exec("raise error", {"error": error}))
        for number, step in enumerate((100, 110), start=1):
            save(run_dir, step)
            link(run_dir, rolling_tag(step), epoch_tag(number))
            queue.offer(rolling_tag(step), [epoch_tag(number)], step)
            settle(queue)
    failures = [record.message for record in caplog.records if "could not copy" in record.message]
    assert [message.split(":")[1] for message in failures] == [
        " could not copy epoch_00001",
        " could not copy epoch_00001",
        " could not copy epoch_00002",
    ]
    assert "hunter2" not in caplog.text
    save(run_dir, 120)
    queue.offer(rolling_tag(120), [], 120)
    assert queue.finish(60) == []
    assert set(tags(backup)) == {epoch_tag(1), epoch_tag(2)}


def test_finish_returns_the_failed_copies(run_dir: Path, tmp_path: Path) -> None:
    queue = BackupQueue(Backup(str(tmp_path / "nas"), "run", SETTINGS), lambda: run_dir)
    save(run_dir, 100)
    queue.offer(rolling_tag(100), [], 100)
    assert queue.finish(60) == [rolling_tag(100)]


def test_a_checkpoint_that_cannot_be_linked_is_logged(
    run_dir: Path, local_location: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = BackupQueue(Backup(str(local_location), "run", SETTINGS), lambda: run_dir)
    queue.offer(rolling_tag(100), [], 100)
    assert "could not prepare the backup of rolling_step_000100: manifest.json cannot be read" in caplog.text
    save(run_dir, 110)
    queue.offer(rolling_tag(110), [], 110)  # due, as nothing has been copied
    assert queue.finish(60) == []


def test_an_epoch_that_an_earlier_process_could_not_copy_is_copied(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", changed_settings(roles=("epoch",)))
    save(run_dir, 100)
    link(run_dir, rolling_tag(100), epoch_tag(1))
    queue = BackupQueue(backup, lambda: run_dir)
    settle(queue)
    save(run_dir, 110)
    assert queue._schedule.due(rolling_tag(110), [], 110) == [epoch_tag(1)]
    queue.offer(rolling_tag(110), [], 110)
    assert queue.finish(60) == []
    assert tags(backup) == [epoch_tag(1)]


def test_a_storage_that_is_down_at_the_start_is_read_again_later(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    MemoryFileSystem.store.clear()
    save(run_dir, 100)
    link(run_dir, rolling_tag(100), epoch_tag(1))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "ls", lambda *args, **kwargs: 1 / 0)
        queue = BackupQueue(Backup("memory://nas", "run", SETTINGS), lambda: run_dir)
        settle(queue)
    assert "could not list the backups: division by zero" in caplog.text
    assert queue._schedule.due(rolling_tag(110), [], 110) == [rolling_tag(110)]
    save(run_dir, 110)
    queue.offer(rolling_tag(110), [], 110)
    settle(queue)
    assert queue._schedule.due(rolling_tag(120), [], 120) == [epoch_tag(1)]
    queue.finish(60)


def test_links_left_by_a_crash_are_deleted(run_dir: Path, local_location: Path) -> None:
    generation = save(run_dir, 100)
    (run_dir / COPYING).mkdir()
    commit.link(Disk(), generation.path, run_dir / COPYING, generation.tag)
    (run_dir / COPYING / "epoch_00001.tmp").mkdir()
    BackupQueue(Backup(str(local_location), "run", SETTINGS), lambda: run_dir).finish(60)
    assert not (run_dir / COPYING).exists()
    assert problem_of(generation) is None


def test_the_links_are_not_listed_as_checkpoints(run_dir: Path) -> None:
    generation = save(run_dir, 100)
    (run_dir / COPYING).mkdir()
    commit.link(Disk(), generation.path, run_dir / COPYING, generation.tag)
    assert [found.path for found in scan(run_dir)] == [generation.path]


def test_the_queue_does_not_copy_into_the_directory_of_the_checkpoints(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = BackupQueue(Backup(str(run_dir.parent), "run", changed_settings(keep=1)), lambda: run_dir)
    for step in (100, 200, 300):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        settle(queue)
    queue.finish(60)
    assert [found.step for found in scan(run_dir)] == [300, 200, 100]
    assert "overlaps the directory of the checkpoints" in caplog.text


def test_a_location_on_the_disk_of_the_checkpoints_is_reported(
    run_dir: Path, local_location: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BackupQueue(Backup(str(local_location), "run", SETTINGS), lambda: run_dir).finish(60)
    queue = BackupQueue(Backup(str(local_location), "run", SETTINGS), lambda: run_dir)
    settle(queue)
    queue.finish(60)
    assert "is on the same disk as the checkpoints: a disk failure destroys both" in caplog.text
