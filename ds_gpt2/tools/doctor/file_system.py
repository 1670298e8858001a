"""Check the file system of the checkpoints: its kind, and the operations that a checkpoint commit needs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.tools.doctor.finding import Finding
from ds_gpt2.tools.resources.machine import existing

MOUNTS = Path("/proc/mounts")

_NETWORK = frozenset(
    """
    9p afs beegfs ceph cifs fuse.cephfs fuse.glusterfs fuse.juicefs fuse.sshfs glusterfs gpfs lustre nfs nfs4 ocfs2
    orangefs panfs smb3 smbfs virtiofs wekafs
    """.split()
)
_OBJECT_STORES = frozenset({"fuse.gcsfuse", "fuse.goofys", "fuse.mount-s3", "fuse.rclone", "fuse.s3fs"})
_IN_MEMORY = frozenset({"ramfs", "tmpfs"})


@dataclass(frozen=True)
class Mount:
    """A line of /proc/mounts."""

    device: str
    point: Path
    kind: str
    options: frozenset[str]


def kind_of_file_system(directory: Path, mounts: Path = MOUNTS) -> Finding:
    """Check that the file system of ``directory`` is writable, persistent and safe for checkpoints."""
    mount = mount_of(existing(directory), read_mounts(mounts))
    name, found = "file system", f"{mount.kind} on {mount.point}"
    if "ro" in mount.options:
        fix = f"mount it writable (`sudo mount -o remount,rw {mount.point}`); a failing disk becomes read-only"
        return Finding(name, "fail", f"{found} is read-only", fix)
    if mount.kind in _OBJECT_STORES:
        fix = "no atomic rename, no durable writes: set checkpoint.dir to a disk, and checkpoint.backup.to to this"
        return Finding(name, "fail", f"{found}, an object store", fix)
    if mount.kind in _NETWORK or mount.kind.startswith("fuse."):
        fix = (
            "fsync and flock are only as reliable as the server: use a local disk for checkpoint.dir"
            " and this file system for checkpoint.backup.to; it is safer and faster"
        )
        return Finding(name, "warn", f"{found}, a network file system", fix)
    if mount.kind in _IN_MEMORY:
        return Finding(name, "warn", f"{found}, in memory", "a reboot deletes all files: set checkpoint.dir to a disk")
    if mount.kind == "overlay":
        fix = "files are deleted with the container: mount a directory of the host, and set checkpoint.dir to it"
        return Finding(name, "warn", f"{found}, a container's own layer", fix)
    return Finding(name, "ok", f"{found}, local")


def operations(directory: Path) -> list[Finding]:
    """Try the operations that committing a checkpoint and locking a run need."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(directory)) as name:
        folder = Path(name)
        rows = [row for row in (_rename(folder), _sync(folder), _link(folder), _lock(folder)) if row is not None]
    return rows or [Finding("file operations", "ok", "rename, fsync of files and directories, hard links, flock")]


def read_mounts(file: Path = MOUNTS) -> list[Mount]:
    """Return all mounts of this machine.

    Raises:
        OSError: the list cannot be read.
    """
    mounts = []
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        device, point, kind, options = [_unescaped(word) for word in line.split()[:4]]
        mounts.append(Mount(device, Path(point), kind, frozenset(options.split(","))))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount:
    """Return the mount that holds ``path``: the deepest mount point above it, and the last mount on that point."""
    real = path.resolve()
    above = [mount for mount in mounts if real.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point.parts))


def _rename(folder: Path) -> Finding | None:
    (folder / "old.tmp").mkdir()
    (folder / "old.tmp" / "file").write_bytes(b"ds_gpt2")
    (folder / "pointer").write_bytes(b"old")
    (folder / "pointer.tmp").write_bytes(b"new")
    try:
        os.replace(folder / "old.tmp", folder / "new")
        os.replace(folder / "pointer.tmp", folder / "pointer")
        if (folder / "new" / "file").read_bytes() != b"ds_gpt2" or (folder / "pointer").read_bytes() != b"new":
            raise OSError(errno.EIO, "the renamed file has other content")
    except OSError as error:
        fix = "checkpoints are committed by a rename: set checkpoint.dir to another file system"
        return Finding("rename", "fail", f"not possible: {error.strerror}", fix)
    return None


def _sync(folder: Path) -> Finding | None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        fix = "no checkpoint would be durable: set checkpoint.dir to another file system"
        return Finding("fsync of directories", "fail", f"not possible: {error.strerror}", fix)
    return None


def _link(folder: Path) -> Finding | None:
    (folder / "file").write_bytes(b"ds_gpt2")
    try:
        os.link(folder / "file", folder / "link")
    except OSError as error:
        fix = "epoch and best checkpoints will be full copies: provide more space, or set checkpoint.dir"
        return Finding("hard links", "warn", f"not possible: {error.strerror}", fix)
    return None


def _lock(folder: Path) -> Finding | None:
    try:
        with (folder / "lock").open("wb") as first, (folder / "lock").open("wb") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError(errno.ENOLCK, "the same lock was granted twice")
    except OSError as error:
        fix = "a second start of the same run would not be refused: avoid it yourself, or set checkpoint.dir"
        return Finding("flock", "warn", f"not possible: {error.strerror}", fix)
    return None


def _unescaped(word: str) -> str:
    """Decode octal escapes: the kernel writes a space as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)
