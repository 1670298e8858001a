"""Files are written, appended to and deleted without following symbolic links."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk, write_file
from ds_gpt2.common import files, locks
from ds_gpt2.common.files import NotDurableError, append_lines, no_links, remove_tree
from ds_gpt2.run_dir.heartbeat import Heartbeat
from ds_gpt2.run_dir.journal import Journal, read_journal
from ds_gpt2.run_dir.metrics import MetricsFile, drop_after
from ds_gpt2.run_dir.notes import NOTES, Note, append


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user in another directory."""
    path = tmp_path / "victim" / "thesis.txt"
    path.parent.mkdir()
    path.write_text("years of work\n")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "settings": ("config.yaml", lambda run: files.replace_file(run / "config.yaml", "a: 1\n")),
    "lock": ("lock", lambda run: locks.lock(run / "lock", "run").close()),
    "a pointer": ("latest.tmp", lambda run: commit.point_to(Disk(), run, "rolling_step_000001")),
    "a file of a checkpoint": ("manifest.json", lambda run: write_file(Disk(), run / "manifest.json", b"{}")),
    "journal": ("journal.jsonl", lambda run: Journal(run).write("done", "done")),
    "metrics": ("metrics.jsonl", lambda run: MetricsFile(run / "metrics.jsonl").append({"step": 1})),
    "metrics, replaced": ("metrics_replaced.jsonl", lambda run: drop_after(recorded(run / "metrics.jsonl"), 0)),
    "metrics, linked": ("metrics.jsonl", lambda run: drop_after(run / "metrics.jsonl", 0)),
    "metrics, unwritten": (
        "unwritten.jsonl",
        lambda run: write_to_fallback_file(run / "metrics.jsonl", run / "unwritten.jsonl"),
    ),
    "notes": (NOTES, lambda run: append(run, Note("now", 1, "text"))),
    "heartbeat": ("heartbeat/rank_00000", lambda run: Heartbeat(run, 0)),
    "an index of data": ("dataset.json", lambda run: files.replace_file(run / "dataset.json", "{}", durable=True)),
}


def recorded(path: Path) -> Path:
    path.write_text('{"step": 1}\n')
    return path


def write_to_fallback_file(file: Path, fallback_file: Path) -> None:
    """Write a record while ``file`` is not writable."""
    records = MetricsFile(file, lambda: fallback_file)
    records.append({"step": 1})
    records._write_fallback_file(fallback_file)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_follows_a_symbolic_link(run_dir: Path, victim: Path, writer: str) -> None:
    name, write = WRITERS[writer]
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).symlink_to(victim)
    write(run_dir)
    assert victim.read_text() == "years of work\n"
    assert not (run_dir / name).is_symlink()


def test_a_temporary_file_is_not_written_through_a_symbolic_link(
    run_dir: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "00000000")
    (run_dir / "config.yaml.00000000.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.replace_file(run_dir / "config.yaml", "a: 1\n")
    assert victim.read_text() == "years of work\n"


@pytest.mark.parametrize("name", ["rolling_step_000001", "rolling_step_000001.tmp", "backup_in_progress.tmp"])
def test_cleaning_deletes_links_but_not_their_targets(run_dir: Path, victim: Path, name: str) -> None:
    link = run_dir / name
    link.symlink_to(victim.parent)
    commit.sweep(Disk(), run_dir)
    commit.remove(Disk(), run_dir, name)
    commit.discard(Disk(), link)
    assert victim.exists() and not os.path.lexists(link)


def test_a_link_in_the_directory_of_pending_copies_is_deleted_without_its_target(run_dir: Path, victim: Path) -> None:
    copying = run_dir / "backup_in_progress.tmp"
    copying.mkdir()
    (copying / "rolling_step_000001").symlink_to(victim.parent)
    commit.sweep_copying(Disk(), run_dir)
    assert victim.exists() and not copying.exists()


def test_remove_tree_deletes_only_the_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim.parent)
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nothing")
    assert victim.exists() and not os.path.lexists(tmp_path / "link")
    remove_tree(victim.parent)
    assert not victim.parent.exists()


def test_a_pipe_instead_of_a_file_does_not_block(run_dir: Path) -> None:
    os.mkfifo(run_dir / "journal.jsonl")
    with pytest.raises(OSError, match="No such device or address"):
        no_links(str(run_dir / "journal.jsonl"), os.O_WRONLY)


def test_a_line_cut_by_a_full_disk_does_not_affect_other_lines(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: a write is cut at the limit."""
    pid = os.fork()
    if pid == 0:  # in a child process: the limit cannot be raised again
        journal = Journal(tmp_path)
        journal.write("save", "first", 1)
        size = (tmp_path / "journal.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        journal.write("save", "cut", 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
    Journal(tmp_path).write("save", "third", 3)
    assert [event.text for event in read_journal(tmp_path)] == ["first", "third"]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:3])))
    append_lines(tmp_path / "lines", json.dumps({"step": 1}).encode() + b"\n")
    append_lines(tmp_path / "lines", b"another\n", durable=True)
    assert (tmp_path / "lines").read_text() == '{"step": 1}\nanother\n'


def test_lines_that_are_written_but_not_durable_are_a_separate_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("ds_gpt2.common.files.os.fsync", fail)
    with pytest.raises(NotDurableError, match="Input/output error"):
        append_lines(tmp_path / "file", b"a\n", durable=True)
    journal = Journal(tmp_path)
    assert journal.write("done", "done") is None
    journal.write_pending()
    assert [event.kind for event in read_journal(tmp_path)] == ["done"]
