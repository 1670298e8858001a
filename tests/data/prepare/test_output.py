"""The output directory: every kind of --out, and interrupted moves."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_gpt2.cli import main
from ds_gpt2.common.errors import UserError
from ds_gpt2.data.dataset import INDEX, open_dataset
from ds_gpt2.data.prepare import pipeline

NAMES = [INDEX, "train_000000.bin", "val_000000.bin"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write 120 documents as JSON lines."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"This is document number {number}."}) + "\n" for number in range(120)))
    return path


def prepare(corpus: Path, out: object) -> int:
    return main(["prepare", "text", str(corpus), "--out", str(out), "--workers", "1"])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def expected(corpus: Path, tmp_path: Path) -> dict[str, bytes]:
    assert prepare(corpus, tmp_path / "reference") == 0
    return content(tmp_path / "reference")


def test_a_link_is_followed_and_retained(corpus: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "to_empty").symlink_to(tmp_path / "disk")
    (tmp_path / "to_nothing").symlink_to(tmp_path / "new" / "data")
    for name, target in (("to_empty", "disk"), ("to_nothing", "new/data")):
        assert prepare(corpus, tmp_path / name) == 0
        assert (tmp_path / name).is_symlink() and content(tmp_path / target) == expected
    assert not list(tmp_path.rglob("*.unfinished"))


def test_an_empty_directory_is_filled_and_not_replaced(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point can be neither removed nor renamed; a new file system has one directory."""
    out = tmp_path / "mounted"
    (out / "lost+found").mkdir(parents=True)
    before = out.stat().st_ino

    def refuse(path: Path, *arguments: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "rmdir", refuse)
    assert prepare(corpus, out) == 0
    assert out.stat().st_ino == before and content(out) == expected
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "lost+found"])


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system if permitted; otherwise create a plain directory."""
    path = tmp_path / "mount"
    path.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "none", path]).returncode
    yield path
    if mounted:
        subprocess.run(["umount", path], check=True)


def test_a_mount_point_is_filled(corpus: Path, mount_point: Path, expected: dict[str, bytes]) -> None:
    assert prepare(corpus, mount_point) == 0
    assert content(mount_point) == expected


@pytest.mark.parametrize("words", ["data/", "a/b/c", "./x/../data"])
def test_relative_paths_are_resolved(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert prepare(corpus, words) == 0
    assert content(Path(words).resolve()) == expected


def test_an_empty_working_directory_is_used(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    assert prepare(corpus, "..") == 2
    assert prepare(corpus, ".") == 0
    assert content(tmp_path / "here" / "deep") == expected


def test_existing_files_are_not_changed(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "to_full").symlink_to(tmp_path / "full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, reason in (
        ("full", "already exists"),
        ("to_full", "already exists"),
        ("loop", "is not a directory: give --out DIR"),
        ("file", "is not a directory: give --out DIR"),
        ("file/below", "cannot write to"),
        ("x" * 300, "cannot write to"),
    ):
        assert prepare(corpus, tmp_path / name) == 2
        assert reason in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_inside_the_input_is_not_read(corpus: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    corpus.rename(folder / "corpus.jsonl")
    for out in (folder / "ds", tmp_path / "second"):
        assert prepare(folder, out) == 0
        assert content(out) == expected


def failing_move(selects: Callable[[Path, Path], bool]) -> Callable[[Path, Path], Path]:
    """Return a ``Path.rename`` that fails for the selected arguments."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if selects(path, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(path, target)

    return rename


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_move_loses_nothing_and_can_be_repeated(
    corpus: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exists: bool,
) -> None:
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    directory = out / ".unfinished" if exists else tmp_path / "out.unfinished"
    with monkeypatch.context() as broken:
        moved = (lambda path, target: path.name == "train_000000.bin" and target.parent == out) if exists else None
        broken.setattr(Path, "rename", failing_move(moved or (lambda path, target: path == directory)))
        assert prepare(corpus, out) == 2
    assert f"the dataset is complete in {directory} but cannot be moved to {out}" in capsys.readouterr().err
    assert {name: content(directory)[name] for name in NAMES} == expected
    with pytest.raises(UserError, match="not finished"):
        open_dataset(out)
    assert (directory / "progress.json").exists()
    assert prepare(corpus, out) == 0
    assert content(out) == expected and not directory.exists()


def test_an_interrupted_move_is_completed_by_the_same_command(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 0)
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as killed:
        killed.setattr("ds_gpt2.data.prepare.output._move_back", lambda directory, target: None)
        killed.setattr(Path, "rename", failing_move(lambda path, target: target == out / INDEX))
        assert prepare(corpus, out) == 2
    assert sorted(path.name for path in out.iterdir()) == [".unfinished", *NAMES[1:]]
    with pytest.raises(UserError, match="not finished"):
        open_dataset(out)
    assert prepare(corpus, out) == 0
    assert content(out) == expected and sorted(path.name for path in out.iterdir()) == NAMES


@pytest.mark.slow
def test_an_error_at_the_end_of_the_text_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error occurs after the directory was created."""
    monkeypatch.setattr(pipeline, "_RECORD_SECONDS", 99)
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a document"}\n' * 20_000) + b"garbage")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("out", "empty"):
        assert prepare(packed, tmp_path / name) == 2
        assert "other data follows its gzip data" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
