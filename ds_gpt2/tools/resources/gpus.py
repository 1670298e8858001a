"""The GPUs that a run would use."""

from __future__ import annotations

from typing import Any


def open_gpus(nvml: Any, visible: str, ranks: int) -> list[Any]:
    """Handles of the GPUs that the ranks would use, in NVML's order, which is the slots'.

    Args:
        visible: CUDA_VISIBLE_DEVICES; empty: all.
    """
    nvml.nvmlInit()
    if not visible:
        return [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())][:ranks]
    words = [word.strip() for word in visible.split(",")][:ranks]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else nvml.nvmlDeviceGetHandleByUUID(word)
        for word in words
    ]
