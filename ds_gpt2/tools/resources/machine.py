"""Resources of this machine: memory for each rank, disk space for checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from ds_gpt2.common.cgroup import read_cgroup
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.resources.gpus import open_gpus


def memory_per_rank(layout: RankLayout) -> int | None:
    """Return the bytes available to each rank; None if not known.

    On GPUs this is the memory of the smallest GPU, on the CPU an equal share of the available host memory.
    """
    if layout.accelerator == "cpu":
        return host_memory() // layout.ranks
    try:
        import pynvml

        return smallest_gpu_memory(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES", ""), layout.ranks)
    except Exception:  # no library, no driver, a container without permissions
        return None


def host_memory() -> int:
    """Return the host memory that can be allocated, in bytes: limited by the kernel and the control groups."""
    free, limit = psutil.virtual_memory().available, read_cgroup().memory
    return free if limit is None else min(free, limit)


def smallest_gpu_memory(nvml: Any, visible: str, ranks: int) -> int:
    """Return the total memory of the smallest GPU in bytes.

    Args:
        nvml: the module ``pynvml``.
        visible: CUDA_VISIBLE_DEVICES; empty: all GPUs.
    """
    return min(int(nvml.nvmlDeviceGetMemoryInfo(gpu).total) for gpu in open_gpus(nvml, visible, ranks))


def existing(path: Path) -> Path:
    """Return ``path``, or the nearest parent directory that exists."""
    return next(directory for directory in (path.absolute(), *path.absolute().parents) if os.path.isdir(directory))


def disk_free(directory: Path) -> int:
    """Return the free bytes on the disk of ``directory``, which need not exist."""
    return shutil.disk_usage(existing(directory)).free
