"""Check the disks that a run writes to: permissions, free space, inodes, quota."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ds_gpt2.common.formatting import size
from ds_gpt2.tools.doctor.file_system import MOUNTS, mount_of, read_mounts
from ds_gpt2.tools.doctor.finding import Finding
from ds_gpt2.tools.resources.machine import existing
from ds_gpt2.tools.resources.requirements import DiskRequirement
from ds_gpt2.tools.resources.run_checkpoints import own_bytes

_FEW_FILES, _TOO_FEW_FILES = 10_000, 500  # a run creates a few hundred
_LOG_BYTES = 1_000_000_000  # logs and event files of some weeks


def directories(paths: Iterable[Path]) -> list[Finding]:
    """Check that files can be created in each directory, or in the nearest existing directory above it."""
    unique = list(dict.fromkeys(paths))
    rows = [row for directory in unique if (row := _unwritable(directory)) is not None]
    if rows:
        return rows
    return [Finding("directories", "ok", f"{len(unique)} directories are writable by {_user()}")]


def free_space(directory: Path, need: DiskRequirement, reserve: int = 0) -> Finding:
    """Check the free space against all retained checkpoints; the run's own checkpoints count as free.

    Args:
        need: includes ``reserve``.
        reserve: bytes that must remain free.
    """
    free = shutil.disk_usage(existing(directory)).free
    own = own_bytes(directory)
    found = f"{size(free)} free" + (f", {size(own)} used by this run already" if own else "")
    found += f"; a checkpoint takes {size(need.checkpoint)}, all retained checkpoints {size(need.maximum - reserve)}"
    found += f", and {size(reserve)} must remain free (checkpoint.min_free_gb)" if reserve else ""
    if free + own < need.minimum:
        needed = f"at least {size(need.minimum)} are needed{' in total' if reserve else ''}"
        fix = f"{needed}: free some space, or set checkpoint.dir to a larger disk"
        return Finding("free space", "fail", found, fix)
    if free + own < need.maximum:
        fewer = need.rolling - -(-(need.maximum - free - own) // need.checkpoint)
        less = f"set checkpoint.keep_last={fewer}" if fewer >= 2 else "set checkpoint.epochs_as=weights, keep_epochs"
        fix = f"older checkpoints would be deleted early: free some space, or {less}"
        return Finding("free space", "warn", found, fix)
    return Finding("free space", "ok", found)


def space_for_logs(directory: Path, checkpoints: Path) -> Finding:
    """Check the free space for logs, metrics and event files, if they are not on the disk of the checkpoints."""
    name = "space for logs"
    parent = existing(directory)
    if parent.stat().st_dev == existing(checkpoints).stat().st_dev:
        return Finding(name, "ok", f"{directory} is on the disk of the checkpoints")
    free = shutil.disk_usage(parent).free
    if free < _LOG_BYTES:
        fix = "free some space, or set run.dir (and monitor.dir) to another disk"
        return Finding(name, "warn", f"{size(free)} free for {directory}", fix)
    return Finding(name, "ok", f"{size(free)} free for {directory}")


def inodes(directory: Path) -> Finding:
    """Check how many more files the file system can hold."""
    status = os.statvfs(existing(directory))
    if status.f_files == 0:
        return Finding("inodes", "ok", "this file system has no fixed number of files")
    found = f"{status.f_favail:,} more files possible"
    if status.f_favail < _FEW_FILES:
        fix = "delete small files: `df -i` shows the disk, `du --inodes -d 2` the directories"
        return Finding("inodes", "fail" if status.f_favail < _TOO_FEW_FILES else "warn", found, fix)
    return Finding("inodes", "ok", found)


def quota(directory: Path, need: DiskRequirement, mounts: Path = MOUNTS) -> Finding:
    """Check what this user's quota on a local disk still allows to write."""
    mount = mount_of(existing(directory), read_mounts(mounts))
    left = _left_of_quota(mount.device)
    if left is None:
        return Finding("quota", "ok", f"none for {_user()} on {mount.point}")
    own = own_bytes(directory)
    if left + own < need.minimum:
        fix = f"{size(need.minimum)} are needed: request a larger quota"
        return Finding("quota", "fail", f"{size(left)} left", fix)
    if left + own < need.maximum:
        fix = f"up to {size(need.maximum)} are needed: keep fewer checkpoints"
        return Finding("quota", "warn", f"{size(left)} left", fix)
    return Finding("quota", "ok", f"{size(left)} left")


def _unwritable(directory: Path) -> Finding | None:
    """Return a finding if no file can be created in ``directory``, else None."""
    parent = existing(directory)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(directory)  # raises OSError for a path that no file system accepts
        if os.path.exists(directory) and parent != directory.absolute():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        fix = f"give {_user()} write permission, or set another directory"
        return Finding(f"directory {directory.name}", "fail", f"{parent}: {error.strerror}", fix)
    return None


class _Quota(ctypes.Structure):
    """``struct if_dqblk`` of linux/quota.h: block limits in units of 1024 bytes, ``space`` in bytes."""

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
    """Return the bytes that this user may still write; None if there is no quota, or the kernel does not know it.

    The kernel is called directly (quotactl(2)): the ``quota`` program is rarely installed.
    """
    block = _Quota()
    call = ctypes.CDLL(None, use_errno=True).quotactl
    if call(_GET_USER_QUOTA, os.fsencode(device), os.getuid(), ctypes.byref(block)) != 0:
        number = ctypes.get_errno()
        if number in _NO_QUOTA:
            return None
        raise OSError(number, os.strerror(number))
    limits = [limit * 1024 for limit in (block.hard_blocks, block.soft_blocks) if limit]
    return max(0, min(limits) - block.space) if limits else None


def _user() -> str:
    """Return the name of this user; its number where it has no name, as in some containers."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"
