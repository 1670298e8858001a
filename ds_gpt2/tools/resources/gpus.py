"""GPUs that a run uses."""

from __future__ import annotations

from typing import Any


def open_gpus(nvml: Any, visible: str, ranks: int) -> list[Any]:
    """Return the NVML handles of the GPUs that the ranks use, in the order of NVML, which is that of the slots.

    Args:
        visible: CUDA_VISIBLE_DEVICES; empty: all GPUs.
    """
    nvml.nvmlInit()
    if not visible:
        return [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())][:ranks]
    words = [word.strip() for word in visible.split(",")][:ranks]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else nvml.nvmlDeviceGetHandleByUUID(word)
        for word in words
    ]
