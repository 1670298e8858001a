"""Memory and cores: of the machine, and what a container or job leaves of them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from ds_gpt2.common.formatting import counted, size
from ds_gpt2.common.host import usable_cores
from ds_gpt2.tools.doctor.row import Finding
from ds_gpt2.tools.resources.cgroup import Cgroup

_SHM_WANTED = 1 << 30  # bytes: NVIDIA's advice for containers, `--shm-size=1g`
_SHM_NEEDED = 32 << 20  # bytes: NCCL cannot even start with less where GPUs share no bus
_FAST_ENOUGH = 1.5  # times the least need
_MUCH_SWAP = 0.5


def shared_memory(accelerator: str, directory: Path = Path("/dev/shm")) -> Finding:
    """NCCL's ranks exchange data through it where GPUs cannot reach each other; gloo goes over loopback."""
    name, fix = "shared memory", "start the container with `--shm-size=1g`, or `mount -o remount,size=1g /dev/shm`"
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return Finding(name, "fail" if accelerator == "cuda" else "warn", f"no {directory}: {error.strerror}", fix)
    whole, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{size(free)} free of {size(whole)} in {directory}"
    if accelerator == "cpu":
        return Finding(name, "ok", f"{found}; ranks on the CPU do without")
    if free < _SHM_NEEDED:
        return Finding(name, "fail", found, fix)
    return Finding(name, "warn" if free < _SHM_WANTED else "ok", found, fix if free < _SHM_WANTED else "")


def host(need: int, limits: Cgroup) -> Finding:
    """
    Args:
        need: bytes at least, see ``requirements.host_memory``.
    """
    free = psutil.virtual_memory().available
    found = f"{size(free)} free"
    if limits.memory is not None:
        found += f", {size(limits.memory)} left by the cgroup"
        free = min(free, limits.memory)
    found += f"; the ranks take at least {size(need)}"
    if free < need:
        return Finding("memory", "fail", found, "end other programs, raise the container's limit, or use fewer ranks")
    if free < _FAST_ENOUGH * need:
        return Finding("memory", "warn", found, "little is left for activations and the page cache: end other programs")
    return Finding("memory", "ok", found)


def cores(accelerator: str, ranks: int, limits: Cgroup) -> Finding:
    """Cores that this process may use, against ranks."""
    count = usable_cores()
    found = f"{count} for {counted(ranks, 'rank')}"
    if limits.cores is not None and limits.cores < count:
        found += f", of which the cgroup grants {limits.cores:g}"
        threads = max(1, int(limits.cores // ranks))
        fix = f"ranks would be halted now and then: grant more, or set OMP_NUM_THREADS={threads}"
        return Finding("cores", "warn", found, fix)
    if accelerator == "cuda" and count < ranks:
        return Finding("cores", "warn", found, "a rank needs a core of its own to keep its GPU busy: allow more cores")
    if count < ranks:
        found += ", which share them"
    return Finding("cores", "ok", found)


def tasks(ranks: int, limits: Cgroup, per_rank: int = 128) -> Finding:
    """Processes and threads that a container may still start."""
    if limits.tasks is None:
        return Finding("cgroup tasks", "ok", "no limit")
    found = f"{limits.tasks:,} more processes and threads; {counted(ranks, 'rank')} may have up to {per_rank * ranks:,}"
    if limits.tasks < per_rank * ranks:
        return Finding("cgroup tasks", "fail", found, "start the container with a larger `--pids-limit`")
    return Finding("cgroup tasks", "ok", found)


def swap(proc: Path = Path("/proc")) -> Finding:
    """How the kernel behaves when memory runs out."""
    swapped = psutil.swap_memory()
    overcommit = int((proc / "sys/vm/overcommit_memory").read_text())
    adjustment = int((proc / "self/oom_score_adj").read_text())
    found = f"{size(swapped.total)} of swap" if swapped.total else "no swap"
    if overcommit == 2:
        fix = "memory that is reserved but not used counts: `sudo sysctl vm.overcommit_memory=0`"
        return Finding("swap", "warn", f"{found}; vm.overcommit_memory=2", fix)
    if swapped.total and swapped.used > _MUCH_SWAP * swapped.total:
        return Finding(
            "swap", "warn", f"{found}, {size(swapped.used)} in use", "end other programs: what is swapped is slow"
        )
    if adjustment > 0:
        fix = "start it from a service or from tmux outside the desktop's session"
        found += f"; oom_score_adj {adjustment}: killed before others when memory runs out"
        return Finding("swap", "warn", found, fix)
    return Finding("swap", "ok", found + ("" if swapped.total else ": when memory runs out the kernel kills at once"))
