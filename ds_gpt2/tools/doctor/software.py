"""Python and the packages, against the ranges that pyproject.toml gives."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.tools.doctor.row import Finding

PYPROJECT = PROJECT_DIR / "pyproject.toml"

_SHOWN = ("torch", "deepspeed")


def versions(pyproject: Path = PYPROJECT) -> list[Finding]:
    """Python and every package that is needed; nothing is imported."""
    python, requirements = read_ranges(pyproject)
    rows = []
    if platform.python_version() not in python:
        rows.append(
            Finding("Python", "fail", f"{platform.python_version()} is not {python}", "use another interpreter")
        )
    for requirement in requirements:
        if (row := _misfit(requirement)) is not None:
            rows.append(row)
    if rows:
        return rows
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in _SHOWN)
    found = f"Python {platform.python_version()}, {shown}; all {len(requirements)} packages fit"
    return [Finding("versions", "ok", found)]


def tensorboard() -> Finding:
    """Loaded for real: a broken installation is found only so."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # whatever is broken in it
        fix = f"`{sys.executable} -m pip install --force-reinstall tensorboard`"
        return Finding("TensorBoard", "fail", f"cannot be loaded: {type(error).__name__}: {error}", fix)
    return Finding("TensorBoard", "ok", f"{metadata.version('tensorboard')}, {SummaryWriter.__name__} loads")


def compiler(wanted: bool | str, accelerator: str) -> Finding:
    """What torch.compile needs, where run.compile has it used."""
    import torch

    from ds_gpt2.distributed import torch_compile

    if wanted is False or (wanted == "auto" and accelerator == "cpu"):
        return Finding("compiler", "ok", f"not needed: run.compile is {str(wanted).lower()}")
    if (missing := torch_compile.missing_requirement(torch.device(accelerator))) is None:
        return Finding("compiler", "ok", "the model will be compiled")
    if wanted is True:
        return Finding("compiler", "fail", f"run.compile is true, but {missing[0]}", missing[1])
    return Finding("compiler", "warn", f"the model will not be compiled, which costs speed: {missing[0]}", missing[1])


def terminal_tools() -> list[str]:
    """Of the programs that keep a run alive without a terminal, those that are here."""
    return [tool for tool in ("tmux", "screen", "systemd-run") if shutil.which(tool)]


def read_ranges(pyproject: Path) -> tuple[SpecifierSet, list[Requirement]]:
    """``requires-python`` and ``dependencies``; Python 3.10 has no parser for TOML, so these two are found by sight.

    Raises:
        ValueError: they are not where they should be.
    """
    text = pyproject.read_text(encoding="utf-8")
    python = re.search(r'^requires-python = "([^"]+)"', text, re.MULTILINE)
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if python is None or block is None:
        raise ValueError(f"{pyproject} names no requires-python or no dependencies")
    return SpecifierSet(python[1]), [Requirement(word) for word in re.findall(r'"([^"]+)"', block[1])]


def _misfit(requirement: Requirement) -> Finding | None:
    fix = f'`{sys.executable} -m pip install "{requirement}"`'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "fail", "not installed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return Finding(requirement.name, "warn", f"{version} is not {requirement.specifier}, which was tested", fix)
