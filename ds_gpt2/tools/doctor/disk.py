"""The disks that a run writes to: permissions, room, kind, what they can do and how fast."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pwd
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.formatting import size
from ds_gpt2.tools.doctor.row import Finding
from ds_gpt2.tools.resources.requirements import Storage

MOUNTS = Path("/proc/mounts")

_NETWORK = frozenset(
    """
    9p afs beegfs ceph cifs fuse.cephfs fuse.glusterfs fuse.juicefs fuse.sshfs glusterfs gpfs lustre nfs nfs4 ocfs2
    orangefs panfs smb3 smbfs virtiofs wekafs
    """.split()
)
_OBJECT_STORES = frozenset({"fuse.gcsfuse", "fuse.goofys", "fuse.mount-s3", "fuse.rclone", "fuse.s3fs"})
_IN_MEMORY = frozenset({"ramfs", "tmpfs"})
_FEW_FILES, _TOO_FEW_FILES = 10_000, 500  # a run makes some hundreds
_FOR_LOGS = 1_000_000_000  # bytes: logs and event files of weeks

_BLOCK = 16 << 20  # bytes written between two fsyncs
_SLOW_SYNC = 0.5  # seconds
_LONG_SAVE = 300.0  # seconds; where nothing is known of how long a step takes
_MOST_OF_THE_DISK = 10  # a test file never takes more than this part of what is free


@dataclass(frozen=True)
class Mount:
    """A line of /proc/mounts."""

    device: str
    point: Path
    kind: str
    options: frozenset[str]


@dataclass(frozen=True)
class Speed:
    """How fast a disk took a file."""

    written: int  # bytes
    seconds: float  # until all of it was durable
    sync_seconds: float  # of a small write made durable, the median
    worst_sync_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.written / self.seconds


def directories(wanted: Iterable[Path]) -> list[Finding]:
    """Whether files can be made in, or where there would be, each of these."""
    unique = list(dict.fromkeys(wanted))
    rows = [row for directory in unique if (row := _unwritable(directory)) is not None]
    if rows:
        return rows
    return [Finding("directories", "ok", f"{len(unique)} places can be written to by {_user()}")]


def room(directory: Path, need: Storage) -> Finding:
    """Free space for all that is kept; what the run's checkpoints take already counts as free."""
    free = shutil.disk_usage(existing(directory)).free
    own = _bytes_in(directory)
    found = f"{size(free)} free" + (f", {size(own)} taken by the run already" if own else "")
    found += f"; a checkpoint takes {size(need.checkpoint)}, all that is kept {size(need.most)}"
    if free + own < need.least:
        fix = f"at least {size(need.least)} are needed: make room, or set checkpoint.dir to a larger disk"
        return Finding("room", "fail", found, fix)
    if free + own < need.most:
        fewer = need.last - -(-(need.most - free - own) // need.checkpoint)
        less = f"set checkpoint.keep_last={fewer}" if fewer >= 2 else "set checkpoint.epochs_as=weights, keep_epochs"
        return Finding("room", "warn", found, f"older checkpoints would be deleted early: make room, or {less}")
    return Finding("room", "ok", found)


def room_for_logs(directory: Path, checkpoints: Path) -> Finding:
    """Room for what grows beside the checkpoints."""
    name = "room for logs"
    place = existing(directory)
    if place.stat().st_dev == existing(checkpoints).stat().st_dev:
        return Finding(name, "ok", f"{directory} is on the disk of the checkpoints")
    free = shutil.disk_usage(place).free
    if free < _FOR_LOGS:
        fix = "make room, or set run.dir (and monitor.dir) to another disk"
        return Finding(name, "warn", f"{size(free)} free below {directory}", fix)
    return Finding(name, "ok", f"{size(free)} free below {directory}")


def inodes(directory: Path) -> Finding:
    """How many more files the file system takes."""
    status = os.statvfs(existing(directory))
    if status.f_files == 0:
        return Finding("inodes", "ok", "this file system has no fixed number of files")
    found = f"{status.f_favail:,} more files fit"
    if status.f_favail < _FEW_FILES:
        fix = "delete small files: `df -i` shows which disk, `du --inodes -d 2` where they are"
        return Finding("inodes", "fail" if status.f_favail < _TOO_FEW_FILES else "warn", found, fix)
    return Finding("inodes", "ok", found)


def quota(directory: Path, need: Storage, mounts: Path = MOUNTS) -> Finding:
    """This user's quota on a local disk; how much may still be written under it."""
    mount = mount_of(existing(directory), read_mounts(mounts))
    left = _left_of_quota(mount.device)
    if left is None:
        return Finding("quota", "ok", f"none for {_user()} on {mount.point}")
    own = _bytes_in(directory)
    if left + own < need.least:
        return Finding("quota", "fail", f"{size(left)} left", f"{size(need.least)} are needed: ask for a larger quota")
    if left + own < need.most:
        return Finding("quota", "warn", f"{size(left)} left", f"the settings keep up to {size(need.most)}: keep fewer")
    return Finding("quota", "ok", f"{size(left)} left")


def file_system(directory: Path, mounts: Path = MOUNTS) -> Finding:
    """What kind of disk it is, from the list of mounts."""
    mount = mount_of(existing(directory), read_mounts(mounts))
    found = f"{mount.kind} on {mount.point}"
    if "ro" in mount.options:
        fix = f"mount it for writing (`sudo mount -o remount,rw {mount.point}`): a disk that fails turns so by itself"
        return Finding("file system", "fail", f"{found} is read-only", fix)
    if mount.kind in _OBJECT_STORES:
        fix = "it cannot rename at once or make anything durable: set checkpoint.dir to a disk, and backup.to to this"
        return Finding("file system", "fail", f"{found}, an object store", fix)
    if mount.kind in _NETWORK or mount.kind.startswith("fuse."):
        fix = (
            "a file system of another machine or program: fsync and flock are worth what its server makes of them;"
            " a local disk for checkpoint.dir and this one for checkpoint.backup.to is safer and faster"
        )
        return Finding("file system", "warn", f"{found}, a network file system", fix)
    if mount.kind in _IN_MEMORY:
        return Finding(
            "file system", "warn", f"{found}, in memory", "a reboot takes all of it: set checkpoint.dir to a disk"
        )
    if mount.kind == "overlay":
        fix = "what is written goes with the container: mount a directory of the host, and set checkpoint.dir to it"
        return Finding("file system", "warn", f"{found}, a container's own layer", fix)
    return Finding("file system", "ok", f"{found}, local")


def operations(directory: Path) -> list[Finding]:
    """What committing a checkpoint and locking a run consist of, done once for real."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(directory)) as folder:
        place = Path(folder)
        rows = [row for row in (_rename(place), _sync(place), _link(place), _lock(place)) if row is not None]
    return rows or [Finding("file operations", "ok", "rename, fsync of files and directories, hard links, flock")]


def measure(directory: Path, most_bytes: int = 256 << 20, seconds: float = 2.0) -> Speed:
    """Write a file until either limit, each block made durable, then small ones; nothing of it stays.

    Raises:
        OSError: nothing can be written there.
    """
    place = existing(directory)
    blocks = max(1, min(most_bytes, shutil.disk_usage(place).free // _MOST_OF_THE_DISK) // _BLOCK)
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        written, begun = 0, time.monotonic()
        for _ in range(blocks):
            written += file.write(block)
            os.fsync(file)
            taken = time.monotonic() - begun
            if taken > seconds:
                break
        syncs = list(_small_syncs(file.fileno(), seconds / 4))
    return Speed(written, max(taken, 1e-9), statistics.median(syncs), max(syncs))


def speed(directory: Path, checkpoint: int, ranks_limit: float, between_saves: float | None) -> list[Finding]:
    """
    Args:
        checkpoint: bytes of one.
        ranks_limit: bytes a second that all ranks together may write; 0: no limit.
        between_saves: seconds; None where no step has been timed yet.
    """
    seen = measure(directory)
    return [_write_speed(seen, checkpoint, ranks_limit, between_saves), _sync_speed(seen)]


def read_mounts(file: Path = MOUNTS) -> list[Mount]:
    """
    Raises:
        OSError: the list cannot be read.
    """
    mounts = []
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        device, point, kind, options = [_unescaped(word) for word in line.split()[:4]]
        mounts.append(Mount(device, Path(point), kind, frozenset(options.split(","))))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount:
    """The mount that ``path`` lies on: the deepest above it, and of several on one point the last."""
    real = path.resolve()
    above = [mount for mount in mounts if real.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point.parts))


def existing(path: Path) -> Path:
    """``path``, or the nearest directory above it that is there, as far as this user can see."""
    place = path.absolute()
    while not os.path.isdir(place) and place != place.parent:
        place = place.parent
    return place


def _write_speed(seen: Speed, checkpoint: int, ranks_limit: float, between_saves: float | None) -> Finding:
    rate = min(seen.bytes_per_second, ranks_limit or seen.bytes_per_second)
    save = checkpoint / rate
    found = f"{size(seen.written)} at {seen.bytes_per_second / 1e6:,.0f} MB/s; a checkpoint takes {_seconds(save)}"
    if rate < seen.bytes_per_second:
        found += f" at {rate / 1e6:,.0f} MB/s (checkpoint.write_mb_per_s)"
    if between_saves is not None:
        found += f", one is due every {_seconds(between_saves)}"
    if save > (_LONG_SAVE if between_saves is None else between_saves / 2):
        fix = "training would wait for the disk: a larger checkpoint.every, or checkpoint.dir on a faster disk"
        return Finding("write speed", "warn", found, fix)
    return Finding("write speed", "ok", found)


def _sync_speed(seen: Speed) -> Finding:
    found = f"a small write is durable after {seen.sync_seconds * 1e3:.1f} ms"
    found += f", at worst {seen.worst_sync_seconds * 1e3:.1f} ms"
    if seen.sync_seconds > _SLOW_SYNC:
        return Finding("fsync", "warn", found, "the disk is busy or far away: look at `iostat -x 1`")
    return Finding("fsync", "ok", found)


def _unwritable(directory: Path) -> Finding | None:
    place = existing(directory)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(directory)  # a path that no file system accepts
        if os.path.exists(directory) and place != directory.absolute():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        fix = f"let {_user()} write there, or set another directory"
        return Finding(f"directory {directory.name}", "fail", f"{place}: {error.strerror}", fix)
    return None


def _rename(place: Path) -> Finding | None:
    (place / "old.tmp").mkdir()
    (place / "old.tmp" / "file").write_bytes(b"ds_gpt2")
    (place / "pointer").write_bytes(b"old")
    (place / "pointer.tmp").write_bytes(b"new")
    try:
        os.replace(place / "old.tmp", place / "new")
        os.replace(place / "pointer.tmp", place / "pointer")
        if (place / "new" / "file").read_bytes() != b"ds_gpt2" or (place / "pointer").read_bytes() != b"new":
            raise OSError(errno.EIO, "something else came out of it")
    except OSError as error:
        fix = "checkpoints are committed by a rename: set checkpoint.dir to another file system"
        return Finding("rename", "fail", f"not possible: {error.strerror}", fix)
    return None


def _sync(place: Path) -> Finding | None:
    try:
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        fix = "no checkpoint would be durable: set checkpoint.dir to another file system"
        return Finding("fsync of directories", "fail", f"not possible: {error.strerror}", fix)
    return None


def _link(place: Path) -> Finding | None:
    (place / "file").write_bytes(b"ds_gpt2")
    try:
        os.link(place / "file", place / "link")
    except OSError as error:
        fix = "ends of epochs and the best are whole copies then: count on more room, or set checkpoint.dir"
        return Finding("hard links", "warn", f"not possible: {error.strerror}", fix)
    return None


def _lock(place: Path) -> Finding | None:
    try:
        with (place / "lock").open("wb") as first, (place / "lock").open("wb") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError(errno.ENOLCK, "two hold one lock")
    except OSError as error:
        fix = "nothing would stop a second start of the same run: take care yourself, or set checkpoint.dir"
        return Finding("flock", "warn", f"not possible: {error.strerror}", fix)
    return None


def _small_syncs(handle: int, seconds: float) -> Iterator[float]:
    begun = time.monotonic()
    for number in range(20):
        start = time.monotonic()
        os.pwrite(handle, bytes(4096), number * 4096)
        os.fsync(handle)
        yield time.monotonic() - start
        if time.monotonic() - begun > seconds:
            return


class _Quota(ctypes.Structure):
    """``struct if_dqblk`` of linux/quota.h; blocks are of 1024 bytes, space is in bytes."""

    _fields_ = [
        ("hard_blocks", ctypes.c_uint64),
        ("soft_blocks", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("hard_inodes", ctypes.c_uint64),
        ("soft_inodes", ctypes.c_uint64),
        ("inodes", ctypes.c_uint64),
        ("block_time", ctypes.c_uint64),
        ("inode_time", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    ]


_GET_USER_QUOTA = 0x800007 << 8  # linux/quota.h: QCMD(Q_GETQUOTA, USRQUOTA)
_NO_QUOTA = {errno.ESRCH, errno.ENOSYS, errno.ENOTBLK, errno.ENOENT, errno.ENODEV, errno.EINVAL}


def _left_of_quota(device: str) -> int | None:
    """Bytes; None where no quota is set, or the disk is none whose quota the kernel tells."""
    block = _Quota()
    call = ctypes.CDLL(None, use_errno=True).quotactl
    if call(_GET_USER_QUOTA, os.fsencode(device), os.getuid(), ctypes.byref(block)) != 0:
        number = ctypes.get_errno()
        if number in _NO_QUOTA:
            return None
        raise OSError(number, os.strerror(number))
    limits = [limit * 1024 for limit in (block.hard_blocks, block.soft_blocks) if limit]
    return max(0, min(limits) - block.space) if limits else None


def _bytes_in(directory: Path) -> int:
    """Bytes of the files below, those with several names once."""
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _unescaped(word: str) -> str:
    """The kernel writes spaces and the like as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _user() -> str:
    """By name; a container's user may have none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"
