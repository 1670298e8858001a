"""Memory and cores: of the machine, and what a container or job leaves of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.doctor.finding import Row
from ds_gpt2.machine import usable_cores
from ds_gpt2.wording import counted, size

_NO_LIMIT = 1 << 60  # bytes; cgroup v1 writes a number about 2**63 for none
_SHM_WANTED = 1 << 30  # bytes: NVIDIA's advice for containers, `--shm-size=1g`
_SHM_NEEDED = 32 << 20  # bytes: NCCL cannot even start with less where GPUs share no bus
_FAST_ENOUGH = 1.5  # times the least need
_MUCH_SWAP = 0.5


@dataclass(frozen=True)
class Cgroup:
    """What the control groups above this process allow; None where nothing limits it."""

    memory: int | None  # bytes that may still be taken
    cores: float | None
    tasks: int | None  # processes and threads that may still be started


def shared_memory(accelerator: str, directory: Path = Path("/dev/shm")) -> Row:
    """NCCL's ranks exchange data through it where GPUs cannot reach each other; gloo goes over loopback."""
    name, mend = "shared memory", "start the container with `--shm-size=1g`, or `mount -o remount,size=1g /dev/shm`"
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return Row(name, "fail" if accelerator == "cuda" else "warn", f"no {directory}: {error.strerror}", mend)
    whole, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{size(free)} free of {size(whole)} in {directory}"
    if accelerator == "cpu":
        return Row(name, "ok", f"{found}; ranks on the CPU do without")
    if free < _SHM_NEEDED:
        return Row(name, "fail", found, mend)
    return Row(name, "warn" if free < _SHM_WANTED else "ok", found, mend if free < _SHM_WANTED else "")


def host(need: int, limits: Cgroup) -> Row:
    """
    Args:
        need: bytes at least, see ``need.host_memory``.
    """
    free = psutil.virtual_memory().available
    found = f"{size(free)} free"
    if limits.memory is not None:
        found += f", {size(limits.memory)} left by the cgroup"
        free = min(free, limits.memory)
    found += f"; the ranks take at least {size(need)}"
    if free < need:
        return Row("memory", "fail", found, "end other programs, raise the container's limit, or use fewer ranks")
    if free < _FAST_ENOUGH * need:
        return Row("memory", "warn", found, "little is left for activations and the page cache: end other programs")
    return Row("memory", "ok", found)


def cores(accelerator: str, ranks: int, limits: Cgroup) -> Row:
    """Cores that this process may use, against ranks."""
    count = usable_cores()
    found = f"{count} for {counted(ranks, 'rank')}"
    if limits.cores is not None and limits.cores < count:
        found += f", of which the cgroup grants {limits.cores:g}"
        threads = max(1, int(limits.cores // ranks))
        mend = f"ranks would be halted now and then: grant more, or set OMP_NUM_THREADS={threads}"
        return Row("cores", "warn", found, mend)
    if accelerator == "cuda" and count < ranks:
        return Row("cores", "warn", found, "a rank needs a core of its own to keep its GPU busy: allow more cores")
    if count < ranks:
        found += ", which share them"
    return Row("cores", "ok", found)


def tasks(ranks: int, limits: Cgroup, per_rank: int = 128) -> Row:
    """Processes and threads that a container may still start."""
    if limits.tasks is None:
        return Row("cgroup tasks", "ok", "no limit")
    found = f"{limits.tasks:,} more processes and threads; {counted(ranks, 'rank')} may have up to {per_rank * ranks:,}"
    if limits.tasks < per_rank * ranks:
        return Row("cgroup tasks", "fail", found, "start the container with a larger `--pids-limit`")
    return Row("cgroup tasks", "ok", found)


def swap(proc: Path = Path("/proc")) -> Row:
    """How the kernel behaves when memory runs out."""
    swapped = psutil.swap_memory()
    overcommit = int((proc / "sys/vm/overcommit_memory").read_text())
    adjustment = int((proc / "self/oom_score_adj").read_text())
    found = f"{size(swapped.total)} of swap" if swapped.total else "no swap"
    if overcommit == 2:
        mend = "memory that is reserved but not used counts: `sudo sysctl vm.overcommit_memory=0`"
        return Row("swap", "warn", f"{found}; vm.overcommit_memory=2", mend)
    if swapped.total and swapped.used > _MUCH_SWAP * swapped.total:
        return Row(
            "swap", "warn", f"{found}, {size(swapped.used)} in use", "end other programs: what is swapped is slow"
        )
    if adjustment > 0:
        mend = "start it from a service or from tmux outside the desktop's session"
        found += f"; oom_score_adj {adjustment}: killed before others when memory runs out"
        return Row("swap", "warn", found, mend)
    return Row("swap", "ok", found + ("" if swapped.total else ": when memory runs out the kernel kills at once"))


def read_cgroup(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> Cgroup:
    """The tightest limits among the groups that hold this process, of version 1 or 2.

    Args:
        membership: the text of /proc/self/cgroup.
    """
    if membership is None:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    memory: list[int] = []
    quotas: list[float] = []
    more: list[int] = []
    for folder in _groups(root, membership):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < _NO_LIMIT:
                memory.append(max(0, most - used + _cache(folder)))
        quotas += _quota(folder)
        most, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None and used is not None:
            more.append(max(0, most - used))
    return Cgroup(min(memory, default=None), min(quotas, default=None), min(more, default=None))


def _groups(root: Path, membership: str) -> Iterator[Path]:
    """Directories of this process's groups and of all above them; in a container, of those it can see."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        trees = (
            [root / controllers, *(root / name for name in controllers.split(","))]
            if controllers
            else [root, root / "unified"]
        )
        for tree in dict.fromkeys(trees):
            place = tree / path.lstrip("/")
            while place != tree and tree in place.parents:
                yield place
                place = place.parent
            yield tree


def _cache(folder: Path) -> int:
    """Bytes counted as used that hold files and are given up when memory is wanted."""
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in ("active_file", "inactive_file"))


def _quota(folder: Path) -> list[float]:
    """Cores that CPU time is granted for, if that is limited here."""
    words = _text(folder / "cpu.max").split()
    quota, period = (words[0], words[1]) if len(words) == 2 else ("", "")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() else []


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
