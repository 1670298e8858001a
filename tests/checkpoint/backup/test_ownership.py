"""Copies are written by one run only, and by one process at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from small_backup import (
    FILES,
    SETTINGS,
    SIZE,
    read_at,
    save,
    tags,
)

from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.catalog import open_generation
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_address import RunAddress


def start_run(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("config.yaml", "journal.jsonl"):
        (directory / name).touch()
    return directory


def test_a_copied_run_does_not_change_the_copies_of_the_original(tmp_path: Path, run_dir: Path, location: str) -> None:
    mine, copied = start_run(tmp_path / "mine"), start_run(tmp_path / "copied")
    original = Backup(location, "run", SETTINGS, run_dir=mine)
    generation = save(run_dir, 250)
    original.copy(generation)
    before = read_at(location, generation.tag)
    with pytest.raises(UserError, match=f"has the backups of the run in {mine} on .*: set checkpoint.backup.to to an"):
        Backup(location, "run", SETTINGS, run_dir=copied).copy(save(run_dir, 500))
    assert tags(original) == [generation.tag] and read_at(location, generation.tag) == before
    assert original.copy(open_generation(generation.path)) == 0
    if not location.startswith("memory://"):  # also refused before training starts
        with pytest.raises(UserError, match="has the backups of the run in"):
            Backup(location, "run", SETTINGS, run_dir=copied).check_named(run_dir)
        original.check_named(run_dir)


def test_a_moved_run_takes_over_its_copies(tmp_path: Path, run_dir: Path, location: str) -> None:
    mine = start_run(tmp_path / "mine")
    Backup(location, "run", SETTINGS, run_dir=mine).copy(save(run_dir, 250))
    moved = mine.rename(tmp_path / "moved")
    backup = Backup(location, "run", SETTINGS, run_dir=moved)
    backup.check_named(run_dir)
    backup.copy(save(run_dir, 500))
    assert len(tags(backup)) == 2


def test_two_runs_do_not_alternate_in_one_location(
    tmp_path: Path, run_dir: Path, location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = start_run(tmp_path / "mine")
    here = Backup(location, "run", SETTINGS, run_dir=mine)
    generation = save(run_dir, 250)
    here.copy(generation)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    theirs = mine.rename(tmp_path / "theirs")  # another machine sees no run at the path of the first
    Backup(location, "run", SETTINGS, run_dir=theirs).copy(generation)  # it looks like a moved run
    assert "this run takes them over" in caplog.text
    monkeypatch.undo()
    theirs.rename(mine)
    with pytest.raises(UserError, match=r"on another: set checkpoint\.backup\.to to another location"):
        here.copy(save(run_dir, 500))


def test_a_run_is_recognized_from_two_machines_and_by_two_paths(
    tmp_path: Path, run_dir: Path, location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = start_run(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path)
    here = Backup(location, "run", SETTINGS, run_dir=mine)
    here.copy(save(run_dir, 250))
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    Backup(location, "run", SETTINGS, run_dir=tmp_path / "link" / "mine").copy(save(run_dir, 500))
    here.copy(save(run_dir, 750))
    assert caplog.text == ""


def test_a_copied_run_does_not_use_copies_without_a_recorded_owner(
    tmp_path: Path, run_dir: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No owner is recorded, but the run records where it was last started: at the path of the original."""
    mine, copied = start_run(tmp_path / "mine"), start_run(tmp_path / "copied")
    Backup(location, "run", SETTINGS).copy(save(run_dir, 250))
    monkeypatch.setattr("ds_gpt2.checkpoint.backup.ownership.last_seen", lambda _: mine)
    with pytest.raises(UserError, match=f"has the backups of the run in {mine} on"):
        Backup(location, "run", SETTINGS, run_dir=copied).copy(save(run_dir, 500))
    Backup(location, "run", SETTINGS, run_dir=mine).copy(save(run_dir, 500))


def test_an_inaccessible_run_does_not_count_as_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr("ds_gpt2.config.run_address.is_run_dir", refuse)
    assert not RunAddress(str(tmp_path), "here").is_in_use()


def test_two_simultaneous_copies_of_a_run_wait_for_each_other(
    run_dir: Path, local_location: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: run}\n")
    generation = save(run_dir, 5)
    first, second = (Backup(str(local_location), "run", SETTINGS, run_dir=run) for _ in range(2))
    started, resumed, waited = threading.Event(), threading.Event(), threading.Event()

    def hold(_: int) -> None:
        started.set()
        assert resumed.wait(60)

    def wait(size: int) -> None:
        if not resumed.is_set():
            assert size == 0  # nothing is sent while it waits
            waited.set()

    sent: list[int] = []
    copies = [
        threading.Thread(target=lambda: sent.append(first.copy(generation, hold))),
        threading.Thread(target=lambda: started.wait(60) and sent.append(second.copy(generation, wait))),
    ]
    for copy in copies:
        copy.start()
    assert waited.wait(60)
    resumed.set()
    for copy in copies:
        copy.join(60)
    assert sent == [len(FILES) * SIZE, 0] and tags(second) == [generation.tag]
