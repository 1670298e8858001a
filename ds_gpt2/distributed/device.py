"""The device of a rank: its selection, CPU threads, memory allocator, determinism."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.common.host import usable_cores
from ds_gpt2.distributed import collectives


def choose(setting: str) -> torch.device:
    """Return the device of this rank and set ``DS_ACCELERATOR``. Call it before DeepSpeed is imported.

    Args:
        setting: ``run.device``: cuda, cpu, or auto (``DS_ACCELERATOR`` if it is set, else cuda where available).

    Raises:
        UserError: CUDA is required but not available, or there are more ranks than GPUs.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting
    name = os.environ.setdefault("DS_ACCELERATOR", name) if setting == "auto" else name
    if name == "cuda":
        _check_cuda()
        torch.cuda.set_device(collectives.local_rank())
        device = torch.device("cuda", collectives.local_rank())
    else:
        device = torch.device("cpu")
        _prepare_cpu()
    os.environ["DS_ACCELERATOR"] = name
    return device


def be_deterministic() -> None:
    """Select deterministic kernels. Call it before the first computation.

    On a GPU, the backward pass of attention and cuBLAS are not deterministic by default. CPU kernels always are.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's documentation, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    # This debugging aid, on by default, writes all memory once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module's class


def describe(device: torch.device) -> str:
    """Return one line for the log: the number of ranks, the device and the backend."""
    ranks = counted(collectives.world_size(), "rank")
    if device.type == "cuda":
        return f"{ranks} on {torch.cuda.get_device_name(device)}, NCCL"
    unused = ""
    if torch.cuda.is_available():
        unused = " (GPUs are present, but run.device or DS_ACCELERATOR is cpu)"
    elif Path("/dev/nvidia0").exists():
        unused = f" (an NVIDIA device is present, but PyTorch {torch.__version__} cannot use it)"
    return f"{ranks} on the CPU with {counted(torch.get_num_threads(), 'thread')} each, gloo{unused}"


def _check_cuda() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            f"run.device is cuda, but PyTorch {torch.__version__} sees no GPU: check `nvidia-smi`, install a CUDA build"
            " of PyTorch, or set run.device=cpu"
        )
    ranks, gpus = collectives.local_world_size(), torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(f"{ranks} ranks, but this machine has {counted(gpus, 'GPU')}: start with --num_gpus {gpus}")


def _prepare_cpu() -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // collectives.local_world_size()))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks instead of returning them to the kernel.

    By default every temporary above 32 MiB is a new mmap whose pages all fault again in each step: half of the step
    time with 4 ranks on 2 cores. Other C libraries have no mallopt; nothing is changed there.
    """
    # glibc reads MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ only when a process starts, which is too late here for
    # ranks that `deepspeed`, `torchrun` or `srun` have started directly.
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
