"""Copies in another place: verified, resumable, never half a one, never in training's way."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.queue import BackupQueue, BackupSchedule, StoppedError
from ds_gpt2.checkpoint.backup.storage import reason_of, redact
from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, problem_of, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, COPYING, MANIFEST, epoch_tag, rolling_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_address import RunAddress
from ds_gpt2.config.settings import BackupSettings

SETTINGS = BackupSettings(every=100, keep=2)


def changed_settings(**changes: object) -> BackupSettings:
    return SETTINGS.model_copy(update=changes)


FILES = ("a.pt", "b.pt", "c.pt")
SIZE = 1000


def content(name: str, seed: int) -> bytes:
    return hashlib.shake_128(f"{name} {seed}".encode()).digest(SIZE)


def save(
    directory: Path,
    step: int,
    seed: int = 0,
    names: tuple[str, ...] = FILES,
    minute: int | None = None,
    evaluated: bool = True,
) -> Generation:
    """Commit a small checkpoint, the way training does."""
    tag = rolling_tag(step)
    partial = directory / (tag + ".tmp")
    partial.mkdir(parents=True)
    files = {}
    for name in names:
        (partial / name).write_bytes(content(name, seed))
        files[name] = FileEntry(bytes=SIZE, sha256=hashlib.sha256(content(name, seed)).hexdigest())
    minute = step % 1440 if minute is None else minute
    manifest = Manifest(
        created=f"2026-01-01T{minute // 60:02d}:{minute % 60:02d}:00+00:00",
        epoch=0.5,
        state={"step": step, "unevaluated": None if evaluated else {}},
        world_size=1,
        identity={},
        settings={},
        versions={},
        files=files,
    )
    commit.commit(Disk(), directory, tag, manifest)
    return open_generation(directory / tag)


def link(directory: Path, source: str, tag: str) -> Generation:
    commit.link(Disk(), directory / source, directory, tag)
    return open_generation(directory / tag)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """``checkpoints/<run>/``."""
    path = tmp_path / "checkpoints" / "run"
    path.mkdir(parents=True)
    return path


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    (tmp_path / "place").mkdir()
    yield str(tmp_path / "place") if request.param == "local" else "memory://place"
    MemoryFileSystem.store.clear()


@pytest.fixture
def local_place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def read_at(place: str, tag: str) -> dict[str, bytes]:
    """Every file of a copy, read without the code under test."""
    if place.startswith("memory://"):
        start = f"/place/run/{tag}/"
        store = MemoryFileSystem.store
        return {path.removeprefix(start): file.getvalue() for path, file in store.items() if path.startswith(start)}
    path = Path(place) / "run" / tag
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}


def write_at(place: str, tag: str, name: str, data: bytes) -> None:
    if place.startswith("memory://"):
        MemoryFileSystem().pipe_file(f"/place/run/{tag}/{name}", data)
    else:
        (Path(place) / "run" / tag / name).write_bytes(data)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def read_in(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def tags(backup: Backup) -> list[str]:
    return [copy.tag for copy in backup.copies()]


class Interrupter:
    """A progress that lets so many blocks pass."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def __call__(self, _: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError("pulled the plug")


def test_a_copy_is_the_same_files(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    assert backup.copies() == []
    assert backup.copy(generation) == 3 * SIZE
    assert read_at(place, generation.tag) == read_in(generation.path)
    assert [(copy.tag, copy.manifest) for copy in backup.copies()] == [(generation.tag, generation.manifest)]
    assert backup.copy(generation) == 0


def test_a_local_place_is_a_directory_to_resume_from(run_dir: Path, local_place: Path) -> None:
    backup = Backup(str(local_place), "run", SETTINGS)
    for step in (250, 500):
        backup.copy(save(run_dir, step))
    found = candidates(run_dir, str(local_place / "run"))
    assert [one.step for one in found] == [500, 250]
    assert [problem_of(one) for one in found] == [None, None]
    assert os.stat(found[0].path / "a.pt").st_ino != os.stat(run_dir / found[0].tag / "a.pt").st_ino


# Each file is a block to send and a block to read back; before that comes one call for what was there already.
@pytest.mark.parametrize(("blocks", "sent_again"), [(0, 3), (1, 2), (2, 2), (3, 1), (4, 1), (5, 0)])
def test_an_interrupted_copy_goes_on_with_what_is_left(run_dir: Path, place: str, blocks: int, sent_again: int) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(1 + blocks))
    assert MANIFEST not in read_at(place, generation.tag)
    assert backup.copies() == []
    assert backup.copy(generation) == sent_again * SIZE
    assert read_at(place, generation.tag) == read_in(generation.path)


def test_a_copy_killed_in_the_second_file_sends_only_the_rest(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(3))
    assert read_at(place, generation.tag)["a.pt"] == content("a.pt", 0)
    assert read_at(place, generation.tag).get("b.pt") != content("b.pt", 0)
    assert backup.copy(generation) == 2 * SIZE


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_source_is_refused(run_dir: Path, place: str, name: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / name).write_bytes(flipped(content(name, 0)))
    backup = Backup(place, "run", SETTINGS)
    with pytest.raises(DamagedError, match=f"{name} is damaged: its sha256 is not the one written"):
        backup.copy(generation)
    assert MANIFEST not in read_at(place, generation.tag)
    assert backup.copies() == []


def test_a_damaged_source_does_not_harm_a_good_copy(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    (generation.path / "b.pt").write_bytes(flipped(content("b.pt", 0)))
    assert backup.copy(generation) == 0
    assert read_at(place, generation.tag)["b.pt"] == content("b.pt", 0)


def test_a_source_without_a_good_manifest_is_refused(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / MANIFEST).write_bytes(b"{}")
    with pytest.raises(DamagedError, match="not what was written"):
        Backup(place, "run", SETTINGS).copy(open_generation(generation.path))
    assert read_at(place, generation.tag) == {}


def test_a_missing_source_file_is_refused(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    (generation.path / "c.pt").unlink()
    backup = Backup(place, "run", SETTINGS)
    with pytest.raises(FileNotFoundError):
        backup.copy(generation)
    assert backup.copies() == []


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_damage_at_the_place_is_found_and_repaired(run_dir: Path, place: str, damage: Callable[[bytes], bytes]) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    write_at(place, generation.tag, "b.pt", damage(content("b.pt", 0)))
    assert backup.copy(generation) == SIZE
    assert read_at(place, generation.tag) == read_in(generation.path)


def test_while_a_copy_is_repaired_it_is_none(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    write_at(place, generation.tag, "b.pt", flipped(content("b.pt", 0)))
    with pytest.raises(StoppedError):
        backup.copy(generation, Interrupter(4))  # three are read, one is told of the good ones
    assert backup.copies() == []


def test_a_damaged_marker_is_no_copy_and_is_repaired(
    run_dir: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    write_at(place, generation.tag, MANIFEST, flipped(read_at(place, generation.tag)[MANIFEST]))
    assert backup.copies() == []
    assert "rolling_step_000250 does not count as a copy: manifest.json is damaged" in caplog.text
    assert backup.copy(generation) == 0
    assert tags(backup) == [generation.tag]


def test_another_checkpoint_of_the_same_name_is_replaced_without_leftovers(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 250, names=(*FILES, "d.pt")))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    second = save(run_dir, 250, seed=1)
    assert backup.copy(second) == 3 * SIZE
    assert read_at(place, second.tag) == read_in(second.path)


@pytest.mark.parametrize("blocks", range(7))
def test_an_interrupted_replacement_is_no_copy(run_dir: Path, place: str, blocks: int) -> None:
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    second = save(run_dir, 250, seed=1)
    with pytest.raises(StoppedError):
        backup.copy(second, Interrupter(4 + blocks if blocks < 6 else 0))
    assert tags(backup) == ([rolling_tag(250)] if blocks == 6 else [])  # 6: stopped before anything was written
    backup.copy(second)
    assert read_at(place, second.tag) == read_in(second.path)


@pytest.mark.parametrize("name", ["a.pt", MANIFEST])
def test_a_place_that_changes_a_bit_silently_is_found_out(
    run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generation, backup = save(run_dir, 250), Backup(place, "run", SETTINGS)
    write, write_local = MemoryFile.write, Disk.write
    whole = (generation.path / name).read_bytes()

    def changed(data: bytes) -> bytes:
        return flipped(whole) if data == whole else data

    monkeypatch.setattr(MemoryFile, "write", lambda self, data: write(self, changed(data)))
    monkeypatch.setattr(Disk, "write", lambda self, file, data: write_local(self, file, changed(data)))
    with pytest.raises(OSError, match=f"{name} does not read back as it was written"):
        backup.copy(generation)
    assert backup.copies() == []


class FailingDisk(Disk):
    """Fails at one operation, and counts them."""

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.done = 0

    def _count(self) -> None:
        self.done += 1
        if self.done - 1 == self.at:
            raise OSError(5, "Input/output error")

    def create(self, path: Path) -> BinaryIO:
        self._count()
        return super().create(path)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self._count()
        super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._count()
        super().sync(file)

    def make_directory(self, path: Path) -> None:
        self._count()
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        self._count()
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)

    def remove_directory(self, path: Path) -> None:
        self._count()
        super().remove_directory(path)


@pytest.mark.parametrize("replacing", [False, True])
def test_whatever_operation_fails_there_is_a_whole_copy_or_none(run_dir: Path, tmp_path: Path, replacing: bool) -> None:
    old = save(run_dir, 250)
    commit.remove(Disk(), run_dir, old.tag)
    for at in itertools.count():
        place = tmp_path / f"place {at}"
        place.mkdir()
        if replacing:
            Backup(str(place), "run", SETTINGS).copy(save(run_dir, 250))
            commit.remove(Disk(), run_dir, old.tag)
        new = save(run_dir, 250, seed=1)
        disk = FailingDisk(at)
        try:
            Backup(str(place), "run", SETTINGS, disk).copy(new)
        except OSError:
            assert all(problem_of(found) is None for found in scan(place / "run"))
        else:
            break
        again = Backup(str(place), "run", SETTINGS)
        again.copy(new)
        assert read_at(str(place), new.tag) == read_in(new.path)
        commit.remove(Disk(), run_dir, new.tag)
    assert disk.done == at > 20


class Recorder(Disk):
    """Writes down what matters for the order of things."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.creating = ""

    def create(self, path: Path) -> BinaryIO:
        self.creating = path.name
        return super().create(path)

    def sync(self, file: BinaryIO) -> None:
        self.done.append(f"sync {self.creating}")
        super().sync(file)

    def rename(self, source: Path, target: Path) -> None:
        self.done.append(f"name {target.name}")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.done.append(f"unlink {path.name}")
        super().unlink(path)

    def sync_directory(self, path: Path) -> None:
        self.done.append(f"sync {path.name}/")
        super().sync_directory(path)


def test_everything_is_durable_before_the_marker_is_there(run_dir: Path, local_place: Path) -> None:
    generation, disk = save(run_dir, 250), Recorder()
    Backup(str(local_place), "run", SETTINGS, disk).copy(generation)
    files = [word for name in FILES for word in (f"sync {name}.tmp", f"name {name}")]
    here = f"sync {generation.tag}/"
    marker = [f"sync {MANIFEST}.tmp", f"name {MANIFEST}"]
    assert disk.done == ["sync place/", "sync run/", *files, here, *marker, here]


def test_the_marker_is_durably_gone_before_anything_changes(run_dir: Path, local_place: Path) -> None:
    generation, disk = save(run_dir, 250), Recorder()
    backup = Backup(str(local_place), "run", SETTINGS, disk)
    backup.copy(generation)
    write_at(str(local_place), generation.tag, "b.pt", b"rot")
    disk.done.clear()
    backup.copy(generation)
    start = [f"unlink {MANIFEST}", f"sync {generation.tag}/", "unlink b.pt", "sync b.pt.tmp"]
    assert disk.done[2:6] == start


def test_reading_back_does_not_read_the_cache(
    run_dir: Path, local_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: forgotten.append(advice))
    Backup(str(local_place), "run", SETTINGS).copy(save(run_dir, 250))
    assert forgotten == [os.POSIX_FADV_DONTNEED] * 4


def test_a_copy_that_was_linked_back_is_not_written_through(run_dir: Path, local_place: Path, tmp_path: Path) -> None:
    backup = Backup(str(local_place), "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.link(Disk(), local_place / "run" / rolling_tag(250), tmp_path, rolling_tag(250))  # as a resume from it does
    commit.remove(Disk(), run_dir, rolling_tag(250))
    backup.copy(save(run_dir, 250, seed=1))
    assert problem_of(open_generation(tmp_path / rolling_tag(250))) is None


def test_an_unmounted_place_is_not_filled(run_dir: Path, tmp_path: Path) -> None:
    backup = Backup(str(tmp_path / "nas"), "run", SETTINGS)
    with pytest.raises(FileNotFoundError, match="mount what belongs there"):
        backup.copy(save(run_dir, 250))
    assert not (tmp_path / "nas").exists()
    with pytest.raises(UserError, match=r"no directory .*nas to copy to: make it, or mount what belongs there"):
        backup.check_exists()


def test_the_checkpoints_are_no_place_for_their_copies(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(run_dir.parent)
    with pytest.raises(UserError, match="is where the checkpoints themselves are"):
        Backup(str(tmp_path / "alias"), "run", SETTINGS).check_apart_from(run_dir)
    Backup(str(run_dir.parent), "other", SETTINGS).check_apart_from(run_dir)
    Backup("memory://place", "run", SETTINGS).check_apart_from(run_dir)


def test_a_kind_of_place_that_nothing_reaches_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"cannot copy to gopher://\*\*\*@host/x: Protocol not known: gopher"):
        Backup("gopher://me:secret@host/x", "run", SETTINGS)


def test_a_directory_of_a_persons_naming_is_not_copied(run_dir: Path, place: str) -> None:
    generation = save(run_dir, 250)
    mine = open_generation(generation.path.rename(run_dir / "mine"))
    with pytest.raises(UserError, match="mine has not the name of a checkpoint"):
        Backup(place, "run", SETTINGS).copy(mine)


@pytest.mark.parametrize(("ask", "truth"), [("size", 5), ("content", b"other"), ("names", [*FILES, "d.pt", MANIFEST])])
def test_a_file_system_that_remembers_is_asked_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, ask: str, truth: object
) -> None:
    """As s3fs does, which goes on reporting what another process has replaced."""
    MemoryFileSystem.store.clear()
    remembered: dict[object, object] = {}

    def remember(method: str, original: Callable[..., object]) -> Callable[..., object]:
        def answer(self: MemoryFileSystem, path: str, *mode: str, **options: object) -> object:
            now = original(self, path, *mode, **options)
            return now if mode == ("wb",) else remembered.setdefault((method, path, *mode), now)

        return answer

    for method in ("info", "ls", "open"):
        monkeypatch.setattr(MemoryFileSystem, method, remember(method, getattr(MemoryFileSystem, method)))
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: remembered.clear())
    backup = Backup("memory://place", "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    arguments = [rolling_tag(250)] if ask == "names" else [rolling_tag(250), "c.pt"]
    assert getattr(backup._place, ask)(*arguments) != truth
    for name in ("c.pt", "d.pt"):  # as another process
        MemoryFile(MemoryFileSystem(), f"/place/run/{rolling_tag(250)}/{name}", b"other").commit()
    assert getattr(backup._place, ask)(*arguments) == truth


@pytest.mark.parametrize("method", ["ls", "info", "_open", "mkdir"])
def test_what_a_library_raises_becomes_an_os_error_without_secrets(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no answer from ftp://me:hunter2@nas")

    MemoryFileSystem.store.clear()
    monkeypatch.setattr(MemoryFileSystem, method, fail)
    with pytest.raises(OSError, match=r"^no answer from ftp://\*\*\*@nas$"):
        Backup("memory://place", "run", SETTINGS).copy(save(run_dir, 250))


def test_a_mistyped_bucket_is_not_made(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Backup("memory://place", "run", SETTINGS).copy(save(run_dir, 250))
    assert "/place/run" in MemoryFileSystem.pseudo_dirs
    assert "/place" not in MemoryFileSystem.pseudo_dirs


# Retention at the place


def test_the_newest_rolling_copies_stay_and_all_of_epochs_and_the_best(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    for step in (100, 200, 300, 400):
        backup.copy(save(run_dir, step))
    for number, step in ((1, 100), (2, 200), (3, 300)):
        backup.copy(link(run_dir, rolling_tag(step), epoch_tag(number)))
    backup.copy(link(run_dir, rolling_tag(100), BEST_TAG))
    assert backup.prune(400) == [rolling_tag(100), rolling_tag(200)]
    kept = {rolling_tag(300), rolling_tag(400), epoch_tag(1), epoch_tag(2), epoch_tag(3), BEST_TAG}
    assert set(tags(backup)) == kept
    assert read_at(place, rolling_tag(100)) == {}
    assert backup.prune(400) == []


def test_a_run_that_went_back_deletes_nothing_of_what_it_left(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    for step in (300, 400, 500):
        backup.copy(save(run_dir, step, minute=0))
    for minute, step in enumerate((10, 20, 30), start=1):
        backup.copy(save(run_dir, step, minute=minute))
        backup.prune(step)
    assert tags(backup) == [rolling_tag(step) for step in (30, 20, 500, 400, 300)]  # what was made last comes first


def test_old_unfinished_copies_are_removed(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    for step in (100, 350):
        with pytest.raises(StoppedError):
            backup.copy(save(run_dir, step), Interrupter(3))
    for step in (200, 300, 400):
        backup.copy(save(run_dir, step))
    assert sorted(backup.prune(400)) == [rolling_tag(100), rolling_tag(200)]
    assert read_at(place, rolling_tag(100)) == {}
    assert read_at(place, rolling_tag(350)) != {}  # somebody may be copying it by hand at this moment


def test_a_copy_is_removed_marker_first(run_dir: Path, tmp_path: Path) -> None:
    generations = [save(run_dir, step) for step in (100, 200, 300)]
    for at in itertools.count():
        place = tmp_path / f"place {at}"
        place.mkdir()
        for generation in generations:
            Backup(str(place), "run", SETTINGS).copy(generation)
        disk = FailingDisk(at)
        try:
            Backup(str(place), "run", SETTINGS, disk).prune(300)
        except OSError:
            assert all(problem_of(found) is None for found in scan(place / "run"))
        else:
            break
    assert at >= 6


def test_removal_elsewhere_begins_with_the_marker(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryFileSystem.store.clear()
    backup = Backup("memory://place", "run", changed_settings(keep=1))
    for step in (100, 200):
        backup.copy(save(run_dir, step, names=("a.pt", "z.pt")))  # a name on either side of the marker's
    removed: list[str] = []
    original = MemoryFileSystem._rm
    monkeypatch.setattr(MemoryFileSystem, "_rm", lambda self, path: (removed.append(path), original(self, path)))
    backup.prune(200)
    first, *others = (path.rsplit("/", 1)[1] for path in removed)
    assert (first, sorted(others)) == (MANIFEST, ["a.pt", "z.pt"])


# Bringing a copy back


def test_a_copy_comes_back_as_a_checkpoint(run_dir: Path, tmp_path: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    back = backup.fetch(generation.tag, tmp_path / "new disk" / "run")
    assert problem_of(back) is None
    assert back.manifest == generation.manifest
    assert read_in(back.path) == read_in(generation.path)
    assert [path.name for path in (tmp_path / "new disk" / "run").iterdir()] == [generation.tag]


def test_a_damaged_copy_does_not_come_back(run_dir: Path, tmp_path: Path, place: str) -> None:
    generation = save(run_dir, 250)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    write_at(place, generation.tag, "b.pt", flipped(content("b.pt", 0)))
    with pytest.raises(DamagedError, match=r"b\.pt is not what was written"):
        backup.fetch(generation.tag, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("tag", [rolling_tag(250), epoch_tag(1), BEST_TAG])
@pytest.mark.parametrize("damaged", ["b.pt", MANIFEST])
def test_a_damaged_checkpoint_is_replaced_by_its_copy(run_dir: Path, place: str, tag: str, damaged: str) -> None:
    generation = save(run_dir, 250)
    if tag != generation.tag:
        generation = link(run_dir, generation.tag, tag)
    whole = read_in(generation.path)
    backup = Backup(place, "run", SETTINGS)
    backup.copy(generation)
    (generation.path / damaged).unlink()
    (generation.path / damaged).write_bytes(b"rot")
    backup.fetch(tag, run_dir)
    assert read_in(run_dir / tag) == whole
    assert not [found.tag for found in scan(run_dir) if found.role == "superseded"]


def test_another_checkpoint_of_that_name_is_superseded(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    commit.remove(Disk(), run_dir, rolling_tag(250))
    save(run_dir, 250, seed=1)
    backup.fetch(rolling_tag(250), run_dir)
    assert {found.tag: problem_of(found) for found in scan(run_dir)} == {
        rolling_tag(250): None,
        "superseded_step_000250": None,
    }
    assert (run_dir / rolling_tag(250) / "a.pt").read_bytes() == content("a.pt", 0)


def test_a_good_checkpoint_is_not_fetched_again(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    generation = save(run_dir, 250)
    backup.copy(generation)
    assert backup.fetch(generation.tag, run_dir, Interrupter(0)).manifest == generation.manifest


@pytest.mark.parametrize("tag", ["rolling_step_000001", "../run/rolling_step_000250", "anything"])
def test_what_is_not_there_cannot_be_fetched(run_dir: Path, place: str, tag: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    with pytest.raises(UserError, match="there are rolling_step_000250"):
        backup.fetch(tag, run_dir)


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("cannot reach ftp://me:hunter2@host/x: timed out", "cannot reach ftp://***@host/x: timed out"),
        ("s3://AKIA:a/b+c@d@bucket/x", "s3://***@bucket/x"),
        ("https://ghp_token@host/x", "https://***@host/x"),
        ("'https://h/x?sv=1&sig=abc%3D' and ?token=t0p", "'https://h/x?sv=***&sig=***' and ?token=***"),
        ("/data/me@home/x", "/data/me@home/x"),
        ("sftp://host:22/x", "sftp://host:22/x"),
    ],
)
def test_no_secret_is_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


@given(
    user=st.text("abc:/+%", max_size=8),
    secret=st.text("XYZ/+:%=", min_size=6, max_size=12),
    where=st.sampled_from(["ftp://{u}:{s}@host/a", "s3://b/c?key={s}", "az://c/d?a=1&sig={s}"]),
)
def test_no_secret_of_any_shape_is_shown(user: str, secret: str, where: str) -> None:
    url = where.format(u=user, s=secret)
    assert secret not in reason_of(OSError(2, "No such file", url))
    assert secret not in reason_of(ValueError("x" * 480 + url))


def test_an_error_without_words_has_a_name() -> None:
    assert reason_of(NotImplementedError()) == "NotImplementedError"
    assert reason_of(OSError("two\nlines")) == "two lines"
    assert len(reason_of(OSError("x" * 10_000))) == 500


# What is due


@pytest.mark.parametrize(
    ("commits", "copied"),
    [
        ([("", 100), ("", 150), ("", 200)], [[rolling_tag(100)], [], [rolling_tag(200)]]),
        ([("", 90), ("", 180), ("", 190)], [[rolling_tag(90)], [], [rolling_tag(190)]]),  # so many steps apart, not at
        ([("", 500), ("", 400)], [[rolling_tag(500)], [rolling_tag(400)]]),  # the run has gone back
        ([("epoch_00001", 100), ("epoch_00002", 150)], [["epoch_00001", rolling_tag(100)], ["epoch_00002"]]),
        ([("best_model", 100), ("best_model", 150)], [["best_model", rolling_tag(100)], []]),
        ([("epoch_00001 best_model", 100)], [["epoch_00001", "best_model", rolling_tag(100)]]),
    ],
)
def test_what_is_due(commits: list[tuple[str, int]], copied: list[list[str]]) -> None:
    cadence = BackupSchedule(SETTINGS, lambda: 0.0)
    assert [cadence.take(rolling_tag(step), roles.split(), step) for roles, step in commits] == copied


def test_only_the_roles_asked_for_are_due() -> None:
    roles = [epoch_tag(1), BEST_TAG]
    assert BackupSchedule(changed_settings(roles=("latest",))).due("rolling_step_000100", roles, 100) == [
        rolling_tag(100)
    ]
    assert BackupSchedule(changed_settings(roles=("epoch",))).due("rolling_step_000100", roles, 100) == [epoch_tag(1)]
    assert BackupSchedule(changed_settings(roles=("best",))).due("rolling_step_000100", roles, 100) == [BEST_TAG]
    assert BackupSchedule(changed_settings(roles=())).due("rolling_step_000100", roles, 100) == []


def test_a_best_that_came_too_soon_is_copied_when_its_time_has_come() -> None:
    hour = [0.0]
    cadence = BackupSchedule(changed_settings(roles=("best",)), lambda: hour[0] * 3600)
    taken = []
    for hours, roles in ((0, [BEST_TAG]), (1, []), (2, [BEST_TAG]), (167, []), (168, []), (400, [])):
        hour[0] = hours
        taken.append(cadence.take(rolling_tag(hours), roles, hours))
    assert taken == [[BEST_TAG], [], [], [], [BEST_TAG], []]


def test_a_failed_copy_is_due_again() -> None:
    cadence = BackupSchedule(SETTINGS, lambda: 0.0)
    assert cadence.take(rolling_tag(100), [epoch_tag(1), BEST_TAG], 100) == [epoch_tag(1), BEST_TAG, rolling_tag(100)]
    cadence.failed(epoch_tag(1))
    cadence.failed(BEST_TAG)
    assert cadence.take(rolling_tag(110), [], 110) == [epoch_tag(1), BEST_TAG]
    assert cadence.take(rolling_tag(120), [], 120) == []
    assert cadence.take(rolling_tag(200), [], 200) == [rolling_tag(200)]
    cadence.failed(rolling_tag(200))
    assert cadence.take(rolling_tag(210), [], 210) == [rolling_tag(210)]


@given(
    commits=st.lists(
        st.tuples(st.integers(1, 80), st.floats(0.1, 100), st.booleans(), st.booleans(), st.booleans()), max_size=40
    )
)
def test_copies_keep_their_distance_and_no_epoch_is_missed(
    commits: list[tuple[int, float, bool, bool, bool]],
) -> None:
    """Whatever the order of commits, ends of epochs, new bests, and failures."""
    clock, step, epochs = 0.0, 0, 0
    cadence = BackupSchedule(SETTINGS, lambda: clock)
    done: list[tuple[str, int, float]] = []
    for steps, hours, is_epoch, is_best, fails in commits:
        clock, step = clock + hours * 3600, step + steps
        epochs += is_epoch
        roles = [epoch_tag(epochs)] * is_epoch + [BEST_TAG] * is_best
        due = cadence.due(rolling_tag(step), roles, step)
        assert cadence.take(rolling_tag(step), roles, step) == due
        for tag in due:
            if fails:
                cadence.failed(tag)
            else:
                done.append((tag, step, clock))
        rolling = [at for tag, at, _ in done if tag.startswith("rolling")]
        assert fails or step - rolling[-1] < SETTINGS.every
    step += 1
    done += [(tag, step, clock) for tag in cadence.take(rolling_tag(step), [], step)]
    assert sorted(tag for tag, _, _ in done if tag.startswith("epoch")) == [epoch_tag(n + 1) for n in range(epochs)]
    rolling = [at for tag, at, _ in done if tag.startswith("rolling")]
    assert all(later - earlier >= SETTINGS.every for earlier, later in itertools.pairwise(rolling))
    best = [at for tag, _, at in done if tag == BEST_TAG]
    assert all(later - earlier >= SETTINGS.best_every_hours * 3600 for earlier, later in itertools.pairwise(best))


def test_a_new_process_goes_on_where_the_one_before_was(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    for step in (100, 160):
        backup.copy(save(run_dir, step))
    backup.copy(save(run_dir, 900))
    commit.remove(Disk(), run_dir, rolling_tag(900))  # of a history that the run has left
    backup.copy(link(run_dir, rolling_tag(100), BEST_TAG))
    link(run_dir, rolling_tag(100), epoch_tag(1))
    hours = [1.0]
    cadence = BackupSchedule(SETTINGS, lambda: 1767225600 + hours[0] * 3600)  # the year 2026, when best_model was made
    cadence.start_from(backup.copies(), scan(run_dir))
    assert cadence.due(rolling_tag(200), [], 200) == [epoch_tag(1)]  # 40 steps after 160 is too soon
    assert cadence.due(rolling_tag(200), [BEST_TAG], 200) == [epoch_tag(1)]
    assert cadence.due(rolling_tag(260), [], 260) == [epoch_tag(1), rolling_tag(260)]
    hours[0] = 170
    assert cadence.due(rolling_tag(200), [], 200) == [epoch_tag(1)]
    link(run_dir, rolling_tag(160), BEST_TAG)
    cadence = BackupSchedule(SETTINGS, lambda: 1767225600 + hours[0] * 3600)
    cadence.start_from(backup.copies(), scan(run_dir))
    assert cadence.due(rolling_tag(200), [], 200) == [epoch_tag(1), BEST_TAG]


def test_an_epoch_at_the_place_does_not_count_as_the_newest(run_dir: Path, place: str) -> None:
    """It may be reduced to weights, from which nothing can be resumed."""
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 100))
    save(run_dir, 190)
    backup.copy(link(run_dir, rolling_tag(190), epoch_tag(1)))
    cadence = BackupSchedule(SETTINGS, lambda: 0.0)
    cadence.start_from(backup.copies(), scan(run_dir))
    assert cadence.due(rolling_tag(200), [], 200) == [rolling_tag(200)]


def test_a_copy_from_before_the_evaluation_of_its_step_does_not_count_as_the_newest(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", SETTINGS)
    backup.copy(save(run_dir, 190, evaluated=False))
    cadence = BackupSchedule(SETTINGS, lambda: 0.0)
    cadence.start_from(backup.copies(), scan(run_dir))
    assert cadence.take_last(rolling_tag(190), 190) == [rolling_tag(190)]


# In the training process


def test_the_queue_copies_what_is_due_and_prunes(run_dir: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ds_gpt2")
    backup = Backup(place, "run", SETTINGS)
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


def test_the_last_checkpoint_of_a_run_is_copied_whatever_the_cadence(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", changed_settings(roles=("latest", "best"), every=1000, best_every_hours=100.0))
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


def settle(queue: BackupQueue) -> None:
    """Wait for the thread, as a run does by training."""
    queue._thread.submit(lambda: None).result(60)


class Gate:
    """Holds up every write to memory:// until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = MemoryFile.write

        def wait_and_write(file: MemoryFile, data: bytes) -> int:
            self.reached.set()
            assert self.open.wait(60)
            return write(file, data)

        monkeypatch.setattr(MemoryFile, "write", wait_and_write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    MemoryFileSystem.store.clear()
    return Gate(monkeypatch)


def test_retention_may_delete_what_is_being_copied(run_dir: Path, gate: Gate) -> None:
    generation = save(run_dir, 100)
    whole = read_in(generation.path)
    queue = BackupQueue(Backup("memory://place", "run", SETTINGS), lambda: run_dir)
    queue.offer(generation.tag, [], 100)
    assert gate.reached.wait(60)
    commit.remove(Disk(), run_dir, generation.tag)
    gate.open.set()
    assert queue.finish(60) == []
    assert read_at("memory://place", generation.tag) == whole


def test_a_place_slower_than_the_cadence_gets_the_newest(run_dir: Path, gate: Gate) -> None:
    backup = Backup("memory://place", "run", SETTINGS)
    queue = BackupQueue(backup, lambda: run_dir)
    for step in (100, 200, 300, 400):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        assert gate.reached.wait(60)
    assert {path.name for path in (run_dir / COPYING).iterdir()} == {rolling_tag(100), rolling_tag(400)}
    gate.open.set()
    assert queue.finish(60) == []
    assert tags(backup) == [rolling_tag(400), rolling_tag(100)]


def test_a_best_that_is_being_read_is_not_replaced_below_the_reader(run_dir: Path, gate: Gate) -> None:
    backup = Backup("memory://place", "run", changed_settings(roles=("best",), best_every_hours=0.0))
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


def test_the_end_of_a_run_is_not_held_up(run_dir: Path, gate: Gate, heard: list[str]) -> None:
    queue = BackupQueue(Backup("memory://place", "run", SETTINGS), lambda: run_dir)
    for step in (100, 200):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
    assert gate.reached.wait(60)
    assert queue.finish(0.05) == [rolling_tag(100), rolling_tag(200)]
    text = "rolling_step_000100, rolling_step_000200 not in memory://place/run; `./launch.sh backup`"
    assert any(text in message for message in heard)
    queue.offer(rolling_tag(200), [epoch_tag(1)], 200)  # too late: nothing happens
    gate.open.set()
    queue._thread.shutdown(wait=True)
    assert MANIFEST not in read_at("memory://place", rolling_tag(100))
    assert not (run_dir / COPYING).exists()


@pytest.mark.parametrize(
    "error", [OSError("connection to ftp://me:hunter2@nas lost"), RuntimeError("hunter3?"), MemoryError()]
)
def test_a_failing_place_is_logged_once_a_failure_and_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    MemoryFileSystem.store.clear()
    backup = Backup("memory://place", "run", changed_settings(roles=("epoch",)))
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


def test_what_failed_last_is_said_at_the_end(run_dir: Path, tmp_path: Path) -> None:
    queue = BackupQueue(Backup(str(tmp_path / "nas"), "run", SETTINGS), lambda: run_dir)
    save(run_dir, 100)
    queue.offer(rolling_tag(100), [], 100)
    assert queue.finish(60) == [rolling_tag(100)]


def test_a_checkpoint_that_cannot_be_linked_costs_a_line(
    run_dir: Path, local_place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = BackupQueue(Backup(str(local_place), "run", SETTINGS), lambda: run_dir)
    queue.offer(rolling_tag(100), [], 100)
    assert "could not begin with rolling_step_000100: manifest.json cannot be read" in caplog.text
    save(run_dir, 110)
    queue.offer(rolling_tag(110), [], 110)  # due, as nothing has been copied
    assert queue.finish(60) == []


def test_an_epoch_that_an_earlier_process_could_not_copy_is_made_up_for(run_dir: Path, place: str) -> None:
    backup = Backup(place, "run", changed_settings(roles=("epoch",)))
    save(run_dir, 100)
    link(run_dir, rolling_tag(100), epoch_tag(1))
    queue = BackupQueue(backup, lambda: run_dir)
    settle(queue)
    save(run_dir, 110)
    assert queue.due(rolling_tag(110), [], 110) == [epoch_tag(1)]
    queue.offer(rolling_tag(110), [], 110)
    assert queue.finish(60) == []
    assert tags(backup) == [epoch_tag(1)]


def test_a_place_that_was_away_at_the_start_is_asked_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    MemoryFileSystem.store.clear()
    save(run_dir, 100)
    link(run_dir, rolling_tag(100), epoch_tag(1))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "ls", lambda *args, **kwargs: 1 / 0)
        queue = BackupQueue(Backup("memory://place", "run", SETTINGS), lambda: run_dir)
        settle(queue)
    assert "could not see what is there: division by zero" in caplog.text
    assert queue.due(rolling_tag(110), [], 110) == [rolling_tag(110)]
    save(run_dir, 110)
    queue.offer(rolling_tag(110), [], 110)
    settle(queue)
    assert queue.due(rolling_tag(120), [], 120) == [epoch_tag(1)]
    queue.finish(60)


def test_links_left_by_a_crash_are_swept(run_dir: Path, local_place: Path) -> None:
    generation = save(run_dir, 100)
    (run_dir / COPYING).mkdir()
    commit.link(Disk(), generation.path, run_dir / COPYING, generation.tag)
    (run_dir / COPYING / "epoch_00001.tmp").mkdir()
    BackupQueue(Backup(str(local_place), "run", SETTINGS), lambda: run_dir).finish(60)
    assert not (run_dir / COPYING).exists()
    assert problem_of(generation) is None


def test_the_links_are_no_checkpoints(run_dir: Path) -> None:
    generation = save(run_dir, 100)
    (run_dir / COPYING).mkdir()
    commit.link(Disk(), generation.path, run_dir / COPYING, generation.tag)
    assert [found.path for found in scan(run_dir)] == [generation.path]


def test_a_copy_onto_the_checkpoints_is_refused_without_harm(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = BackupQueue(Backup(str(run_dir.parent), "run", changed_settings(keep=1)), lambda: run_dir)
    for step in (100, 200, 300):
        save(run_dir, step)
        queue.offer(rolling_tag(step), [], step)
        settle(queue)
    queue.finish(60)
    assert [found.step for found in scan(run_dir)] == [300, 200, 100]
    assert "is where the checkpoints themselves are" in caplog.text


def test_a_place_on_the_same_disk_is_said_to_be_one(
    run_dir: Path, local_place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BackupQueue(Backup(str(local_place), "run", SETTINGS), lambda: run_dir).finish(60)
    queue = BackupQueue(Backup(str(local_place), "run", SETTINGS), lambda: run_dir)
    settle(queue)
    queue.finish(60)
    assert "is on the disk of the checkpoints, and is lost with it" in caplog.text


def begin_run(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("config.yaml", "journal.jsonl"):
        (directory / name).touch()
    return directory


def test_a_copied_run_does_not_touch_the_originals_copies(tmp_path: Path, run_dir: Path, place: str) -> None:
    mine, copied = begin_run(tmp_path / "mine"), begin_run(tmp_path / "copied")
    original = Backup(place, "run", SETTINGS, run_dir=mine)
    generation = save(run_dir, 250)
    original.copy(generation)
    before = read_at(place, generation.tag)
    with pytest.raises(UserError, match=f"has the copies of the run in {mine} on .*: set checkpoint.backup.to to an"):
        Backup(place, "run", SETTINGS, run_dir=copied).copy(save(run_dir, 500))
    assert tags(original) == [generation.tag] and read_at(place, generation.tag) == before
    assert original.copy(open_generation(generation.path)) == 0
    if not place.startswith("memory://"):  # refused before training, too
        with pytest.raises(UserError, match="has the copies of the run in"):
            Backup(place, "run", SETTINGS, run_dir=copied).check_named(run_dir)
        original.check_named(run_dir)


def test_a_moved_run_takes_its_copies_over(tmp_path: Path, run_dir: Path, place: str) -> None:
    mine = begin_run(tmp_path / "mine")
    Backup(place, "run", SETTINGS, run_dir=mine).copy(save(run_dir, 250))
    moved = mine.rename(tmp_path / "moved")
    backup = Backup(place, "run", SETTINGS, run_dir=moved)
    backup.check_named(run_dir)
    backup.copy(save(run_dir, 500))
    assert len(tags(backup)) == 2


def test_two_machines_do_not_take_turns_in_one_location(
    tmp_path: Path, run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = begin_run(tmp_path / "mine")
    here = Backup(place, "run", SETTINGS, run_dir=mine)
    generation = save(run_dir, 250)
    here.copy(generation)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    theirs = mine.rename(tmp_path / "theirs")  # another machine sees no run at the path of the first
    Backup(place, "run", SETTINGS, run_dir=theirs).copy(generation)  # moved there, for all that can be seen
    assert "this run takes them over" in caplog.text
    monkeypatch.undo()
    theirs.rename(mine)
    with pytest.raises(UserError, match=r"on another: set checkpoint\.backup\.to to another location"):
        here.copy(save(run_dir, 500))


def test_one_run_seen_from_two_machines_or_by_two_paths_is_one(
    tmp_path: Path, run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = begin_run(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path)
    here = Backup(place, "run", SETTINGS, run_dir=mine)
    here.copy(save(run_dir, 250))
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    Backup(place, "run", SETTINGS, run_dir=tmp_path / "link" / "mine").copy(save(run_dir, 500))
    here.copy(save(run_dir, 750))
    assert caplog.text == ""


def test_a_copied_run_keeps_off_copies_of_an_earlier_version(
    tmp_path: Path, run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No owner is recorded there, but where the copy was started last."""
    mine, copied = begin_run(tmp_path / "mine"), begin_run(tmp_path / "copied")
    Backup(place, "run", SETTINGS).copy(save(run_dir, 250))
    monkeypatch.setattr("ds_gpt2.checkpoint.backup.backup.last_seen", lambda _: mine)
    with pytest.raises(UserError, match=f"has the copies of the run in {mine} on"):
        Backup(place, "run", SETTINGS, run_dir=copied).copy(save(run_dir, 500))
    Backup(place, "run", SETTINGS, run_dir=mine).copy(save(run_dir, 500))


def test_a_run_that_may_not_be_looked_at_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr("ds_gpt2.config.run_address.is_run_dir", refuse)
    assert not RunAddress(str(tmp_path), "here").is_in_use()


def test_two_copies_of_a_run_at_once_wait_for_each_other(run_dir: Path, local_place: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: run}\n")
    generation = save(run_dir, 5)
    first, second = (Backup(str(local_place), "run", SETTINGS, run_dir=run) for _ in range(2))
    begun, resumed, waited = threading.Event(), threading.Event(), threading.Event()

    def hold(_: int) -> None:
        begun.set()
        assert resumed.wait(60)

    def wait(size: int) -> None:
        if not resumed.is_set():
            assert size == 0  # nothing is sent meanwhile
            waited.set()

    sent: list[int] = []
    copies = [
        threading.Thread(target=lambda: sent.append(first.copy(generation, hold))),
        threading.Thread(target=lambda: begun.wait(60) and sent.append(second.copy(generation, wait))),
    ]
    for copy in copies:
        copy.start()
    assert waited.wait(60)
    resumed.set()
    for copy in copies:
        copy.join(60)
    assert sent == [len(FILES) * SIZE, 0] and tags(second) == [generation.tag]
