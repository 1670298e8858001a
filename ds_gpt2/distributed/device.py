"""What a rank computes on: which device, how many threads, how its memory allocator behaves, how fast it could be."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import usable_cores
from ds_gpt2.distributed import collectives

# Dense bf16 tensor-core FLOP/s with fp32 accumulation, from the vendor's data sheets. The first name found in the
# device's name as whole words counts, so longer names come first.
_PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("RTX A6000", 154.8e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("A10", 125e12),
)


def choose(wanted: str) -> torch.device:
    """Resolve ``run.device`` (auto, cuda, cpu) and tell DeepSpeed, before it is imported.

    Raises:
        UserError: CUDA was asked for and is not there, or there are more ranks than GPUs.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    name = os.environ.setdefault("DS_ACCELERATOR", name) if wanted == "auto" else name
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
    """Have the same kernels add in the same order whenever the same is computed; to be called before anything is.

    On a CPU nothing else happens anyway. On a GPU attention's backward pass and cuBLAS choose speed otherwise.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's documentation, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over all memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module's class


def describe(device: torch.device) -> str:
    """One line: what the ranks run on."""
    ranks = f"{collectives.world_size()} rank" + ("s" if collectives.world_size() > 1 else "")
    if device.type == "cuda":
        return f"{ranks} on {torch.cuda.get_device_name(device)}, NCCL"
    unused = ""
    if torch.cuda.is_available():
        unused = " (GPUs are present but run.device or DS_ACCELERATOR says cpu)"
    elif Path("/dev/nvidia0").exists():
        unused = f" (there is an NVIDIA device, but PyTorch {torch.__version__} cannot use it)"
    return f"{ranks} on the CPU with {torch.get_num_threads()} thread(s) each, gloo{unused}"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in _PEAK_FLOPS if re.search(rf"\b{known}\b", name)), None)


def _check_cuda() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            f"run.device is cuda, but PyTorch {torch.__version__} sees no GPU: check `nvidia-smi`, install a CUDA build"
            " of PyTorch, or set run.device=cpu"
        )
    ranks, gpus = collectives.local_world_size(), torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(f"{ranks} ranks but this machine shows {gpus} GPU(s): start with --num_gpus {gpus}")


def _prepare_cpu() -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // collectives.local_world_size()))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel.

    By default every temporary above 32 MiB is a fresh mmap, and each of its pages faults again at every step; on 4
    ranks of 2 cores that was half of the step time. Other C libraries have no mallopt and are left alone.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
