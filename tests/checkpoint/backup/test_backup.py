"""Copies of checkpoints: they are verified, resumable, pruned, and can be fetched; they are complete or not valid."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import FailingDisk, RecordingDisk
from small_backup import (
    FILES,
    SETTINGS,
    SIZE,
    Interrupter,
    content,
    flipped,
    link,
    read_at,
    read_in,
    save,
    tags,
    write_at,
)

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.queue import StoppedError
from ds_gpt2.checkpoint.catalog import candidates, open_generation, problem_of, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.naming import BEST_TAG, MANIFEST, epoch_tag, rolling_tag
from ds_gpt2.common.errors import UserError


def test_a_copy_has_the_same_files(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    assert backup.copies() == []
    assert backup.copy(generation) == 3 * SIZE
    assert read_at(location, generation.tag) == read_in(generation.path)
    assert [(copy.tag, copy.manifest) for copy in backup.copies()] == [(generation.tag, generation.manifest)]
    assert backup.copy(generation) == 0


def test_a_run_resumes_from_a_local_directory_of_copies(run_dir: Path, local_location: Path) -> None:
    backup = Backup(str(local_location), "run", SETTINGS)
    for step in (250, 500):
        backup.copy(save(run_dir, step))
    found = candidates(run_dir, str(local_location / "run"))
    assert [one.step for one in found] == [500, 250]
    assert [problem_of(one) for one in found] == [None, None]
    assert os.stat(found[0].path / "a.pt").st_ino != os.stat(run_dir / found[0].tag / "a.pt").st_ino


# Each file is sent in one block and read back in one block; the first call is for the existing files.
@pytest.mark.parametrize(("blocks", "sent_again"), [(0, 3), (1, 2), (2, 2), (3, 1), (4, 1), (5, 0)])
def test_an_interrupted_copy_continues_with_the_remaining_files(
    run_dir: Path, location: str, blocks: int, sent_again: int
) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(1 + blocks))
    assert MANIFEST not in read_at(location, generation.tag)
    assert backup.copies() == []
    assert backup.copy(generation) == sent_again * SIZE
    assert read_at(location, generation.tag) == read_in(generation.path)


def test_a_copy_interrupted_in_the_second_file_sends_only_the_rest(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(3))
    assert read_at(location, generation.tag)["a.pt"] == content("a.pt", 0)
    assert read_at(location, generation.tag).get("b.pt") != content("b.pt", 0)
    assert backup.copy(generation) == 2 * SIZE


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_source_is_refused(run_dir: Path, location: str, name: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / name).write_bytes(flipped(content(name, 0)))
    backup = Backup(location, "run", SETTINGS)
    with pytest.raises(DamagedError, match=f"{name} is damaged: sha256 mismatch"):
        backup.copy(generation)
    assert read_at(location, generation.tag) == {}
    assert backup.copies() == []


def test_a_damaged_source_does_not_harm_a_good_copy(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    (generation.path / "b.pt").write_bytes(flipped(content("b.pt", 0)))
    assert backup.copy(generation) == 0
    assert read_at(location, generation.tag)["b.pt"] == content("b.pt", 0)


def test_a_source_without_a_good_manifest_is_refused(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / MANIFEST).write_bytes(b"{}")
    with pytest.raises(DamagedError, match="it cannot be parsed"):
        Backup(location, "run", SETTINGS).copy(open_generation(generation.path))
    assert read_at(location, generation.tag) == {}


def test_a_missing_source_file_is_refused(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / "c.pt").unlink()
    backup = Backup(location, "run", SETTINGS)
    with pytest.raises(DamagedError, match=r"^c\.pt is missing$"):
        backup.copy(generation)
    assert read_at(location, generation.tag) == {}
    assert backup.copies() == []


def test_an_unreadable_source_file_is_damage_of_the_checkpoint_not_of_the_storage(
    run_dir: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = save(run_dir, 250)

    def fail(path: str, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr("ds_gpt2.checkpoint.backup.backup.regular_only", fail)
    with pytest.raises(DamagedError, match=r"^a\.pt cannot be read: Input/output error$"):
        Backup(location, "run", SETTINGS).copy(generation)
    assert read_at(location, generation.tag) == {}


def test_a_missing_source_file_does_not_invalidate_another_backup_of_the_tag(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    earlier = save(run_dir, 250)
    backup.copy(earlier)
    commit.remove(Disk(), run_dir, rolling_tag(250))
    later = save(run_dir, 250, seed=1)
    (later.path / "c.pt").unlink()
    with pytest.raises(DamagedError, match="is missing"):
        backup.copy(later)
    assert [copy.manifest for copy in backup.copies()] == [earlier.manifest]


def test_a_damaged_source_does_not_invalidate_another_backup_of_the_tag(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    earlier = save(run_dir, 250)
    backup.copy(earlier)
    files = read_at(location, earlier.tag)
    commit.remove(Disk(), run_dir, rolling_tag(250))
    later = save(run_dir, 250, seed=1)
    (later.path / "c.pt").write_bytes(flipped(content("c.pt", 1)))
    with pytest.raises(DamagedError, match=r"c\.pt is damaged: sha256 mismatch"):
        backup.copy(later)
    assert read_at(location, earlier.tag) == files


def test_a_backup_with_a_missing_file_is_damaged(run_dir: Path, tmp_path: Path, local_location: Path) -> None:
    backup = Backup(str(local_location), "run", SETTINGS)
    generation = save(run_dir, 250)
    backup.copy(generation)
    (local_location / "run" / generation.tag / "b.pt").unlink()
    with pytest.raises(DamagedError, match=r"rolling_step_000250/b\.pt is missing$"):
        backup.fetch(generation.tag, tmp_path / "fetched")


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_damage_of_a_copy_is_found_and_repaired(run_dir: Path, location: str, damage: Callable[[bytes], bytes]) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    write_at(location, generation.tag, "b.pt", damage(content("b.pt", 0)))
    assert backup.copy(generation) == SIZE
    assert read_at(location, generation.tag) == read_in(generation.path)


def test_a_copy_is_not_valid_while_it_is_repaired(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    write_at(location, generation.tag, "b.pt", flipped(content("b.pt", 0)))
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(4))  # three calls for the files that are read, one for the intact files
    assert backup.copies() == []


def test_a_copy_with_a_damaged_manifest_is_not_valid_and_is_repaired(
    run_dir: Path, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    write_at(location, generation.tag, MANIFEST, flipped(read_at(location, generation.tag)[MANIFEST]))
    assert backup.copies() == []
    assert "rolling_step_000250 is not a valid backup: manifest.json is damaged" in caplog.text
    assert backup.copy(generation) == 0
    assert tags(backup) == [generation.tag]


def test_a_copy_of_another_checkpoint_with_the_same_tag_is_replaced_completely(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 250, names=(*FILES, "d.pt")))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    second = save(run_dir, 250, seed=1)
    assert backup.copy(second) == 3 * SIZE
    assert read_at(location, second.tag) == read_in(second.path)


@pytest.mark.parametrize("blocks", range(7))
def test_an_interrupted_replacement_is_not_a_valid_copy(run_dir: Path, location: str, blocks: int) -> None:
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    second = save(run_dir, 250, seed=1)
    with pytest.raises(StoppedError):
        backup.copy(second, Interrupter(4 + blocks if blocks < 6 else 0))
    assert tags(backup) == ([rolling_tag(250)] if blocks == 6 else [])  # 6: stopped before anything was written
    backup.copy(second)
    assert read_at(location, second.tag) == read_in(second.path)


@pytest.mark.parametrize("replacing", [False, True])
def test_if_any_operation_fails_the_copy_is_complete_or_not_valid(
    run_dir: Path, tmp_path: Path, replacing: bool
) -> None:
    old = save(run_dir, 250)
    commit.remove(Disk(), run_dir, old.tag)
    for at in itertools.count():
        location = tmp_path / f"nas {at}"
        location.mkdir()
        if replacing:
            Backup(str(location), "run", SETTINGS).copy(save(run_dir, 250))
            commit.remove(Disk(), run_dir, old.tag)
        new = save(run_dir, 250, seed=1)
        disk = FailingDisk(tmp_path, at)
        try:
            Backup(str(location), "run", SETTINGS, disk).copy(new)
        except OSError:
            assert all(problem_of(found) is None for found in scan(location / "run"))
        else:
            break
        again = Backup(str(location), "run", SETTINGS)
        again.copy(new)
        assert read_at(str(location), new.tag) == read_in(new.path)
        commit.remove(Disk(), run_dir, new.tag)
    assert len(disk.operations) == at > 20


def durability_steps(disk: RecordingDisk) -> list[str]:
    """Return the operations whose order matters for a power failure."""
    kinds = ("sync", "rename", "unlink", "sync_directory")
    return [str(operation) for operation in disk.operations if operation.kind in kinds]


def test_all_files_are_durable_before_the_manifest_is_written(run_dir: Path, local_location: Path) -> None:
    generation, disk = save(run_dir, 250), RecordingDisk(local_location.parent)
    Backup(str(local_location), "run", SETTINGS, disk).copy(generation)
    files = [word for name in FILES for word in (f"sync {name}.tmp", f"rename {name}")]
    here = f"sync {generation.tag}/"
    marker = [f"sync {MANIFEST}.tmp", f"rename {MANIFEST}"]
    assert durability_steps(disk) == ["sync nas/", "sync run/", *files, here, *marker, here]


def test_the_manifest_is_durably_deleted_before_a_file_is_changed(run_dir: Path, local_location: Path) -> None:
    generation, disk = save(run_dir, 250), RecordingDisk(local_location.parent)
    backup = Backup(str(local_location), "run", SETTINGS, disk)
    backup.copy(generation)
    write_at(str(local_location), generation.tag, "b.pt", b"rot")
    disk.operations.clear()
    backup.copy(generation)
    start = [f"unlink {MANIFEST}", f"sync {generation.tag}/", "unlink b.pt", "sync b.pt.tmp"]
    assert durability_steps(disk)[2:6] == start


def test_a_new_copy_does_not_change_hard_links_to_the_old_one(
    run_dir: Path, local_location: Path, tmp_path: Path
) -> None:
    backup = Backup(str(local_location), "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.link(
        Disk(), local_location / "run" / rolling_tag(250), tmp_path, rolling_tag(250)
    )  # as by a resume from the copy
    commit.remove(Disk(), run_dir, rolling_tag(250))
    backup.copy(save(run_dir, 250, seed=1))
    assert problem_of(open_generation(tmp_path / rolling_tag(250))) is None


def test_copies_in_the_directory_of_the_checkpoints_are_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(run_dir.parent)
    with pytest.raises(UserError, match="overlaps the directory of the checkpoints"):
        Backup(str(tmp_path / "alias"), "run", SETTINGS).check_apart_from(run_dir)
    Backup(str(run_dir.parent), "other", SETTINGS).check_apart_from(run_dir)
    Backup("memory://nas", "run", SETTINGS).check_apart_from(run_dir)


def test_a_renamed_checkpoint_is_not_copied(run_dir: Path, location: str) -> None:
    generation = save(run_dir, 250)
    mine = open_generation(generation.path.rename(run_dir / "mine"))
    with pytest.raises(UserError, match="mine does not have the name of a checkpoint"):
        Backup(location, "run", SETTINGS).copy(mine)


def test_prune_retains_the_newest_rolling_copies_all_epochs_and_the_best(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    for step in (100, 200, 300, 400):
        backup.copy(save(run_dir, step))
    for number, step in ((1, 100), (2, 200), (3, 300)):
        backup.copy(link(run_dir, rolling_tag(step), epoch_tag(number)))
    backup.copy(link(run_dir, rolling_tag(100), BEST_TAG))
    assert backup.prune(400) == [rolling_tag(100), rolling_tag(200)]
    retained = {rolling_tag(300), rolling_tag(400), epoch_tag(1), epoch_tag(2), epoch_tag(3), BEST_TAG}
    assert set(tags(backup)) == retained
    assert read_at(location, rolling_tag(100)) == {}
    assert backup.prune(400) == []


def test_prune_deletes_no_later_steps_after_a_rollback(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    for step in (300, 400, 500):
        backup.copy(save(run_dir, step, minute=0))
    for minute, step in enumerate((10, 20, 30), start=1):
        backup.copy(save(run_dir, step, minute=minute))
        backup.prune(step)
    assert tags(backup) == [rolling_tag(step) for step in (30, 20, 500, 400, 300)]  # the last created comes first


def test_prune_deletes_old_incomplete_copies(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    for step in (100, 350):
        with pytest.raises(StoppedError):
            backup.copy(save(run_dir, step), Interrupter(3))
    for step in (200, 300, 400):
        backup.copy(save(run_dir, step))
    assert sorted(backup.prune(400)) == [rolling_tag(100), rolling_tag(200)]
    assert read_at(location, rolling_tag(100)) == {}
    assert read_at(location, rolling_tag(350)) != {}  # another process may be copying it


def test_if_any_operation_of_prune_fails_all_copies_are_intact(run_dir: Path, tmp_path: Path) -> None:
    generations = [save(run_dir, step) for step in (100, 200, 300)]
    for at in itertools.count():
        location = tmp_path / f"nas {at}"
        location.mkdir()
        for generation in generations:
            Backup(str(location), "run", SETTINGS).copy(generation)
        disk = FailingDisk(tmp_path, at)
        try:
            Backup(str(location), "run", SETTINGS, disk).prune(300)
        except OSError:
            assert all(problem_of(found) is None for found in scan(location / "run"))
        else:
            break
    assert at >= 6


def test_a_fetched_copy_equals_the_checkpoint(run_dir: Path, tmp_path: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    back = backup.fetch(generation.tag, tmp_path / "new disk" / "run")
    assert problem_of(back) is None
    assert back.manifest == generation.manifest
    assert read_in(back.path) == read_in(generation.path)
    assert [path.name for path in (tmp_path / "new disk" / "run").iterdir()] == [generation.tag]


def test_a_damaged_copy_is_not_fetched(run_dir: Path, tmp_path: Path, location: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    write_at(location, generation.tag, "b.pt", flipped(content("b.pt", 0)))
    with pytest.raises(DamagedError, match=r"b\.pt is damaged: size or sha256 mismatch"):
        backup.fetch(generation.tag, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("tag", [rolling_tag(250), epoch_tag(1), BEST_TAG])
@pytest.mark.parametrize("damaged", ["b.pt", MANIFEST])
def test_a_damaged_checkpoint_is_replaced_by_its_copy(run_dir: Path, location: str, tag: str, damaged: str) -> None:
    generation = save(run_dir, 250)
    if tag != generation.tag:
        generation = link(run_dir, generation.tag, tag)
    whole = read_in(generation.path)
    backup = Backup(location, "run", SETTINGS)
    backup.copy(generation)
    (generation.path / damaged).unlink()
    (generation.path / damaged).write_bytes(b"rot")
    backup.fetch(tag, run_dir)
    assert read_in(run_dir / tag) == whole
    assert not [found.tag for found in scan(run_dir) if found.role == "superseded"]


def test_a_fetched_copy_supersedes_a_different_checkpoint_of_its_tag(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    save(run_dir, 250, seed=1)
    backup.fetch(rolling_tag(250), run_dir)
    assert {found.tag: problem_of(found) for found in scan(run_dir)} == {
        rolling_tag(250): None,
        "superseded_step_000250": None,
    }
    assert (run_dir / rolling_tag(250) / "a.pt").read_bytes() == content("a.pt", 0)


def test_a_good_checkpoint_is_not_fetched_again(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    generation = save(run_dir, 250)
    backup.copy(generation)
    assert backup.fetch(generation.tag, run_dir, Interrupter(0)).manifest == generation.manifest


@pytest.mark.parametrize("tag", ["rolling_step_000001", "../run/rolling_step_000250", "anything"])
def test_fetching_a_missing_copy_lists_the_existing_ones(run_dir: Path, location: str, tag: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    with pytest.raises(UserError, match="available: rolling_step_000250"):
        backup.fetch(tag, run_dir)
