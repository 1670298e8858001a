"""Check memory and cores: those of the machine, and the limits of a container or job."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from ds_gpt2.common.cgroup import Cgroup
from ds_gpt2.common.formatting import counted, size
from ds_gpt2.common.host import usable_cores
from ds_gpt2.tools.doctor.finding import Finding

_SHM_RECOMMENDED = 1 << 30  # bytes: NVIDIA's recommendation for containers, `--shm-size=1g`
_SHM_REQUIRED = 32 << 20  # bytes: NCCL cannot start with less where GPUs have no peer-to-peer access
_COMFORTABLE = 1.5  # times the least need
_MUCH_SWAP = 0.5


def shared_memory(accelerator: str, directory: Path = Path("/dev/shm")) -> Finding:
    """Check /dev/shm: NCCL uses it where GPUs have no peer-to-peer access; gloo uses loopback."""
    name, fix = "shared memory", "start the container with `--shm-size=1g`, or `mount -o remount,size=1g /dev/shm`"
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return Finding(name, "fail" if accelerator == "cuda" else "warn", f"no {directory}: {error.strerror}", fix)
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{size(free)} free of {size(total)} in {directory}"
    if accelerator == "cpu":
        return Finding(name, "ok", f"{found}; ranks on the CPU do not use it")
    if free < _SHM_REQUIRED:
        return Finding(name, "fail", found, fix)
    if free < _SHM_RECOMMENDED:
        return Finding(name, "warn", found, fix)
    return Finding(name, "ok", found)


def host(need: int, limits: Cgroup) -> Finding:
    """Check the free memory of the host.

    Args:
        need: bytes that the ranks use at least, see ``requirements.host_memory``.
    """
    free = psutil.virtual_memory().available
    found = f"{size(free)} free"
    if limits.memory is not None:
        found += f", {size(limits.memory)} left in the cgroup"
        free = min(free, limits.memory)
    found += f"; the ranks use at least {size(need)}"
    if free < need:
        return Finding("memory", "fail", found, "stop other programs, raise the container's limit, or use fewer ranks")
    if free < _COMFORTABLE * need:
        fix = "little memory is left for activations and the page cache: stop other programs"
        return Finding("memory", "warn", found, fix)
    return Finding("memory", "ok", found)


def cores(accelerator: str, ranks: int, limits: Cgroup) -> Finding:
    """Check the number of cores that this process may use against the number of ranks."""
    count = usable_cores()
    found = f"{count} for {counted(ranks, 'rank')}"
    if limits.cores is not None and limits.cores < count:
        found += f", limited by the cgroup to {limits.cores:g}"
        threads = max(1, int(limits.cores // ranks))
        fix = f"the kernel would throttle the ranks: allow more cores, or set OMP_NUM_THREADS={threads}"
        return Finding("cores", "warn", found, fix)
    if accelerator == "cuda" and count < ranks:
        return Finding("cores", "warn", found, "each rank needs its own core to keep its GPU busy: allow more cores")
    if count < ranks:
        found += ", shared by the ranks"
    return Finding("cores", "ok", found)


def tasks(ranks: int, limits: Cgroup, per_rank: int = 128) -> Finding:
    """Check how many processes and threads the container may still start."""
    if limits.tasks is None:
        return Finding("cgroup tasks", "ok", "no limit")
    found = f"{limits.tasks:,} more processes and threads; {counted(ranks, 'rank')} may have up to {per_rank * ranks:,}"
    if limits.tasks < per_rank * ranks:
        return Finding("cgroup tasks", "fail", found, "start the container with a larger `--pids-limit`")
    return Finding("cgroup tasks", "ok", found)


def swap(proc: Path = Path("/proc")) -> Finding:
    """Check how the kernel behaves when memory is exhausted."""
    swapped = psutil.swap_memory()
    overcommit = int((proc / "sys/vm/overcommit_memory").read_text())
    adjustment = int((proc / "self/oom_score_adj").read_text())
    found = f"{size(swapped.total)} of swap" if swapped.total else "no swap"
    if overcommit == 2:
        fix = "reserved memory counts as used: `sudo sysctl vm.overcommit_memory=0`"
        return Finding("swap", "warn", f"{found}; vm.overcommit_memory=2", fix)
    if swapped.total and swapped.used > _MUCH_SWAP * swapped.total:
        fix = "stop other programs: swapped memory is slow"
        return Finding("swap", "warn", f"{found}, {size(swapped.used)} in use", fix)
    if adjustment > 0:
        fix = "start the run from a service, or from tmux outside the desktop session"
        found += f"; oom_score_adj {adjustment}: killed before other programs when memory is exhausted"
        return Finding("swap", "warn", found, fix)
    if not swapped.total:
        found += ": when memory is exhausted, the kernel kills a process immediately"
    return Finding("swap", "ok", found)
