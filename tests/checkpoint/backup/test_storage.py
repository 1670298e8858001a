"""The storage of copies: local and remote file systems, their errors, and secrets in their addresses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from small_backup import (
    FILES,
    SETTINGS,
    changed_settings,
    flipped,
    save,
)

from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import redact, redacted_reason
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import MANIFEST, rolling_tag
from ds_gpt2.common.errors import UserError


@pytest.mark.parametrize("name", ["a.pt", MANIFEST])
def test_a_bit_flipped_by_the_storage_is_detected(
    run_dir: Path, location: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generation, backup = save(run_dir, 250), Backup(location, "run", SETTINGS)
    write, write_local = MemoryFile.write, Disk.write
    whole = (generation.path / name).read_bytes()

    def changed(data: bytes) -> bytes:
        return flipped(whole) if data == whole else data

    monkeypatch.setattr(MemoryFile, "write", lambda self, data: write(self, changed(data)))
    monkeypatch.setattr(Disk, "write", lambda self, file, data: write_local(self, file, changed(data)))
    with pytest.raises(OSError, match=f"{name} does not read back as it was written"):
        backup.copy(generation)
    assert backup.copies() == []


def test_files_are_read_back_from_the_disk_not_from_the_cache(
    run_dir: Path, local_location: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: forgotten.append(advice))
    Backup(str(local_location), "run", SETTINGS).copy(save(run_dir, 250))
    assert forgotten == [os.POSIX_FADV_DONTNEED] * 4


def test_nothing_is_written_below_an_unmounted_directory(run_dir: Path, tmp_path: Path) -> None:
    backup = Backup(str(tmp_path / "nas"), "run", SETTINGS)
    with pytest.raises(FileNotFoundError, match="mount its disk"):
        backup.copy(save(run_dir, 250))
    assert not (tmp_path / "nas").exists()
    with pytest.raises(UserError, match=r"the backup directory .*nas does not exist: create it, or mount its disk"):
        backup.check_exists()


def test_an_unknown_protocol_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"cannot back up to gopher://\*\*\*@host/x: Protocol not known: gopher"):
        Backup("gopher://me:secret@host/x", "run", SETTINGS)


@pytest.mark.parametrize(
    ("method", "expected"), [("size", 5), ("content", b"other"), ("names", [*FILES, "d.pt", MANIFEST])]
)
def test_the_cache_of_a_file_system_is_not_used(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str, expected: object
) -> None:
    """For example, s3fs caches file information, which is outdated if another process has replaced a file."""
    MemoryFileSystem.store.clear()
    cached: dict[object, object] = {}

    def caching(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def answer(self: MemoryFileSystem, path: str, *mode: str, **options: object) -> object:
            now = original(self, path, *mode, **options)
            return now if mode == ("wb",) else cached.setdefault((name, path, *mode), now)

        return answer

    for name in ("info", "ls", "open"):
        monkeypatch.setattr(MemoryFileSystem, name, caching(name, getattr(MemoryFileSystem, name)))
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: cached.clear())
    backup = Backup("memory://nas", "run", SETTINGS)
    backup.copy(save(run_dir, 250))
    arguments = [rolling_tag(250)] if method == "names" else [rolling_tag(250), "c.pt"]
    assert getattr(backup._storage, method)(*arguments) != expected
    for name in ("c.pt", "d.pt"):  # as another process
        MemoryFile(MemoryFileSystem(), f"/nas/run/{rolling_tag(250)}/{name}", b"other").commit()
    assert getattr(backup._storage, method)(*arguments) == expected


@pytest.mark.parametrize("method", ["ls", "info", "_open", "mkdir"])
def test_errors_of_libraries_become_os_errors_without_secrets(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no answer from ftp://me:hunter2@nas")

    MemoryFileSystem.store.clear()
    monkeypatch.setattr(MemoryFileSystem, method, fail)
    with pytest.raises(OSError, match=r"^no answer from ftp://\*\*\*@nas$"):
        Backup("memory://nas", "run", SETTINGS).copy(save(run_dir, 250))


def test_a_mistyped_bucket_is_not_created(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Backup("memory://nas", "run", SETTINGS).copy(save(run_dir, 250))
    assert "/nas/run" in MemoryFileSystem.pseudo_dirs
    assert "/nas" not in MemoryFileSystem.pseudo_dirs


def test_a_remote_copy_is_deleted_manifest_first(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryFileSystem.store.clear()
    backup = Backup("memory://nas", "run", changed_settings(keep=1))
    for step in (100, 200):
        backup.copy(save(run_dir, step, names=("a.pt", "z.pt")))  # one name sorts before the manifest, one after it
    removed: list[str] = []
    original = MemoryFileSystem._rm
    monkeypatch.setattr(MemoryFileSystem, "_rm", lambda self, path: (removed.append(path), original(self, path)))
    backup.prune(200)
    first, *others = (path.rsplit("/", 1)[1] for path in removed)
    assert (first, sorted(others)) == (MANIFEST, ["a.pt", "z.pt"])


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
    assert secret not in redacted_reason(OSError(2, "No such file", url))
    assert secret not in redacted_reason(ValueError("x" * 480 + url))


def test_an_error_without_a_message_is_described_by_its_type() -> None:
    assert redacted_reason(NotImplementedError()) == "NotImplementedError"
    assert redacted_reason(OSError("two\nlines")) == "two lines"
    assert len(redacted_reason(OSError("x" * 10_000))) == 500
