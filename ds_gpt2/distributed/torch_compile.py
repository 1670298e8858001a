"""torch.compile: whether a run uses it, and where what it makes is kept from start to start."""

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


def is_wanted(setting: bool | Literal["auto"], accelerator: str) -> bool:
    """What the setting run.compile means on ``accelerator``, cuda or cpu."""
    return accelerator == "cuda" if setting == "auto" else setting


def decide(wanted: bool | Literal["auto"], place: torch.device) -> bool:
    """Whether to compile, by the setting run.compile: "auto" does on a GPU, and says so where it cannot.

    Raises:
        UserError: it was asked for and cannot be done.
    """
    if not is_wanted(wanted, place.type):
        return False
    missing = obstacle(place)
    if missing and wanted is True:
        raise UserError(f"run.compile is true, but {': '.join(missing)}; or set run.compile=false")
    if missing and collectives.local_rank() == 0:  # machines may differ
        log.warning(f"the model is not compiled, which costs speed: {': '.join(missing)}")
    return missing is None


def set_up(compiled: bool) -> None:
    """Tell PyTorch, before DeepSpeed imports its compiler."""
    if not compiled:
        # DeepSpeed imports its Muon, which asks for a compiler that takes seconds to load.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        return
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (kept := _cache_dir()) is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    # PyTorch would keep a process a core for each rank as long as it trains, to compile a dozen kernels once.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _cache_dir() -> Path | None:
    """Where what is compiled outlives a restart of the machine, which may empty PyTorch's own place below /tmp.

    None where there is no such place.
    """
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_gpt2" / "compiled"
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that is ours
        return None
    return place if os.access(place, os.W_OK) else None


def obstacle(place: torch.device) -> tuple[str, str] | None:
    """What is missing, and how to fix it. Triton builds its launchers in C, a CPU's kernels are C++."""
    if place.type == "cpu":
        missing = _no_compiler("CXX", "g++", "clang++")
        return (f"there is no C++ compiler ({missing})", "install one (Debian: apt install g++)") if missing else None
    if torch.cuda.get_device_capability(place) < (7, 0):
        return f"{torch.cuda.get_device_name(place)} is too old for Triton", "set run.compile=false"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "install PyTorch's CUDA build"
    if missing := _no_compiler("CC", "gcc", "clang"):
        return f"there is no C compiler ({missing})", "install one (Debian: apt install gcc)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not there", "install them (Debian: apt install python3-dev)"
    return None


def _no_compiler(variable: str, *names: str) -> str | None:
    """What was looked for in vain; None if it is there."""
    sought = (os.environ[variable],) if variable in os.environ else names
    return None if any(map(shutil.which, sought)) else ", ".join(sought)
