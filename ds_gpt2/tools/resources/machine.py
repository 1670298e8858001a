"""What this machine has for a run: memory for each rank, room for its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.resources.cgroup import read_cgroup
from ds_gpt2.tools.resources.gpus import open_gpus


def memory_for_a_rank(place: RankLayout) -> int | None:
    """Bytes: all of its GPU, of the smallest; on the CPU its share of what is free. None where that is not told."""
    if place.accelerator == "cpu":
        return host_memory() // place.ranks
    try:
        import pynvml

        return least_gpu_memory(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES", ""), place.ranks)
    except Exception:  # no library, no driver, a container without rights
        return None


def host_memory() -> int:
    """Bytes that may be taken here, as far as the kernel and the control groups let one."""
    free, limit = psutil.virtual_memory().available, read_cgroup().memory
    return free if limit is None else min(free, limit)


def least_gpu_memory(nvml: Any, visible: str, ranks: int) -> int:
    """
    Args:
        nvml: NVIDIA's library, ``pynvml``.
        visible: CUDA_VISIBLE_DEVICES; empty: all.
    """
    return min(int(nvml.nvmlDeviceGetMemoryInfo(gpu).total) for gpu in open_gpus(nvml, visible, ranks))


def existing(path: Path) -> Path:
    """``path``, or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.isdir(place))


def disk_free(directory: Path, own: Iterable[int] = ()) -> int:
    """Bytes that checkpoints in ``directory`` may take.

    Args:
        own: bytes that the run's checkpoints there take already.
    """
    return shutil.disk_usage(existing(directory)).free + sum(own)
