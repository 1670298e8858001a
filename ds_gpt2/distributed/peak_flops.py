"""Peak FLOP/s of GPUs, by name."""

from __future__ import annotations

import re

import torch

# Dense bf16 tensor-core FLOP/s with fp32 accumulation, from NVIDIA's data sheets. The first entry whose words occur in
# the device's name applies, so more specific names precede general ones.
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


def peak_flops(device: torch.device) -> float | None:
    """Return the peak dense bf16 FLOP/s of ``device``, or None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in _PEAK_FLOPS if re.search(rf"\b{known}\b", name)), None)
