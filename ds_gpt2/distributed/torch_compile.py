"""torch.compile: whether a run uses it, what it requires, and its cache directory."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.distributed import collectives

log = logging.getLogger(__name__)


def is_enabled(setting: bool | Literal["auto"], accelerator: str) -> bool:
    """Return whether ``run.compile`` enables compilation on ``accelerator`` (cuda or cpu); "auto" does on cuda."""
    return accelerator == "cuda" if setting == "auto" else setting


def decide(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether to compile the model; with "auto", log a warning if a requirement is missing.

    Args:
        setting: ``run.compile``.

    Raises:
        UserError: ``setting`` is true and a requirement is missing.
    """
    if not is_enabled(setting, device.type):
        return False
    missing = missing_requirement(device)
    if missing and setting is True:
        raise UserError(f"run.compile is true, but {': '.join(missing)}; or set run.compile=false")
    if missing and collectives.local_rank() == 0:  # once per machine, because machines may differ
        log.warning(f"the model is not compiled and trains more slowly: {': '.join(missing)}")
    return missing is None


def set_up(compiled: bool) -> None:
    """Set PyTorch's environment variables. Call it before DeepSpeed is imported, which imports the compiler."""
    if not compiled:
        # DeepSpeed's Muon optimizer imports torch._dynamo, which takes seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        return
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (directory := _cache_dir()) is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
    # By default each rank starts a compile process per core and keeps it until training ends, for a dozen kernels.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _cache_dir() -> Path | None:
    """Return a cache directory below the user's, or None if it cannot be written.

    PyTorch's default is below /tmp, which many machines empty when they restart.
    """
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_gpt2" / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    return directory if os.access(directory, os.W_OK) else None


def missing_requirement(device: torch.device) -> tuple[str, str] | None:
    """Return (what compilation on ``device`` lacks, how to fix it), or None.

    Triton compiles its launchers from C; kernels for a CPU are compiled from C++.
    """
    if device.type == "cpu":
        missing = _no_compiler("CXX", "g++", "clang++")
        return (f"there is no C++ compiler ({missing})", "install one (Debian: apt install g++)") if missing else None
    if torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for Triton", "set run.compile=false"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "install PyTorch's CUDA build"
    if missing := _no_compiler("CC", "gcc", "clang"):
        return f"there is no C compiler ({missing})", "install one (Debian: apt install gcc)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed", "install them (Debian: apt install python3-dev)"
    return None


def _no_compiler(variable: str, *names: str) -> str | None:
    """Return the compilers that were searched for, or None if one is found. ``variable`` overrides ``names``."""
    candidates = (os.environ[variable],) if variable in os.environ else names
    return None if any(map(shutil.which, candidates)) else ", ".join(candidates)
