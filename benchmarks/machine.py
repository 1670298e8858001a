"""Describe the machine and versions of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy
import torch

import ds_gpt2


def describe() -> dict[str, str]:
    """Return processor, GPU, versions and date, without names of the machine or the user."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),  # importing it takes seconds
        "numpy": numpy.__version__,
        "ds_gpt2": ds_gpt2.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
