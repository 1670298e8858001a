"""The search for files, and formats by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.files import find_files
from ds_gpt2.data.prepare.formats import Format, format_of, is_searched, stem_of


@pytest.mark.parametrize(
    ("name", "form", "packing"),
    [
        ("a.txt", "text", ""),
        ("A.TXT.GZ", "text", ".gz"),
        ("notes.jsonl.txt", "text", ""),
        ("enwik8", "text", ""),
        ("enwik8.zst", "text", ".zst"),
        ("notes.2024", "text", ""),
        ("x.py", "text", ""),
        ("x.html", "text", ""),
        ("A.JSONL", "jsonl", ""),
        ("a.ndjson.gz", "jsonl", ".gz"),
        ("c4-train.00000-of-00512.json.gz", "jsonl", ".gz"),
        ("a.Parquet", "parquet", ""),
    ],
)
def test_the_suffix_determines_the_format(name: str, form: Any, packing: str) -> None:
    assert format_of(Path(name)) == Format(form, packing)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.csv", "a table"),
        ("a.TSV.gz", "a table"),
        ("a.zip", "an archive"),
        ("a.tar.gz", "an archive"),
        ("a.jsonl.bz2", "of an unsupported compression"),
        ("train.bin", "a token shard"),
        ("a.pdf", "not plain text"),
        ("a.safetensors", "not text"),
        ("a.parquet.gz", r"of unknown format \(\.parquet\.gz\)"),
        ("a.foo", r"of unknown format \(\.foo\): .* --format text"),
    ],
)
def test_an_unsupported_suffix_is_an_error_with_the_supported_ones(name: str, what: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is {what}.*Supported files: .*\.txt.*\.ndjson.*\.parquet"):
        format_of(Path(name))
    assert format_of(Path(name), "jsonl").form == "jsonl"
    assert not is_searched(name)


def test_the_stem_of_a_name() -> None:
    names = ["corpus.jsonl.gz", "essays", "a.b.TXT", "notes.2024"]
    assert [stem_of(name) for name in names] == ["corpus", "essays", "a.b", "notes.2024"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Create a directory with text files, hidden files, other files, links and a pipe."""
    top = tmp_path / "top"
    for name in ("a.txt", "deep/b.txt", ".ipynb_checkpoints/a.txt", "._a.txt", ".DS_Store", "table.csv", "x.PNG"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("text")
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "again").symlink_to(tmp_path / "elsewhere")
    (top / "loop").symlink_to(top)
    (top / "a_second_name").symlink_to(top / "deep")
    (top / "gone.txt").symlink_to("/no/such/file")
    os.mkfifo(top / "pipe.txt")
    return top


def test_links_are_followed_without_loops_and_no_file_is_found_twice(tree: Path, log_messages: list[str]) -> None:
    found = [str(each.path.relative_to(tree)) for each in find_files([tree])]
    assert found == ["a.txt", "again/c.txt", "deep/b.txt"]
    several = find_files([tree / "link", tree, tree / "a.txt"])
    assert [each.path.name for each in several] == ["c.txt", "a.txt", "b.txt"]


def test_files_left_out_are_logged(tree: Path, log_messages: list[str]) -> None:
    find_files([tree])
    assert log_messages == [
        f"left out because they cannot be read: {tree / 'gone.txt'} (a link to /no/such/file, which does not exist)",
        f"read once although found more than once: {tree / 'a_second_name'}, {tree / 'link'}, {tree / 'loop'}",
        "hidden files and directories left out: 3",
        "pipes, sockets and devices left out: 1",
        "files left out, by suffix: 1 .csv, 1 .png",
    ]


def test_a_directory_that_cannot_be_read_is_logged(
    tree: Path, log_messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert tree / "deep" / "b.txt" not in {each.path for each in find_files([tree])}
    assert f"{tree / 'deep'} (Permission denied)" in log_messages[0]


def test_prepared_datasets_are_left_out(tmp_path: Path, log_messages: list[str]) -> None:
    for name in ("ds/dataset.json", "ds/train_000000.bin", "other.unfinished/progress.json", "mine/dataset.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [each.path for each in find_files([tmp_path])] == [tmp_path / "mine" / "dataset.json"]
    assert f"prepared datasets left out: {tmp_path / 'ds'}, {tmp_path / 'other.unfinished'}" in log_messages


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.txt", "gone.txt"])
def test_a_path_that_is_not_a_regular_file_is_an_error(tree: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"is not a regular file|a link to /no/such/file, which cannot be read"):
        find_files([tree / path])


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text file"):
        find_files([tmp_path / "gone.txt"])
    with pytest.raises(UserError, match="no text found"):
        find_files([tmp_path])
