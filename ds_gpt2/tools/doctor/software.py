"""Check Python and the installed packages against the version ranges of pyproject.toml."""

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
from ds_gpt2.tools.doctor.finding import Finding

PYPROJECT = PROJECT_DIR / "pyproject.toml"

_SHOWN = ("torch", "deepspeed")


def versions(pyproject: Path = PYPROJECT) -> list[Finding]:
    """Check the versions of Python and of every required package, without importing them."""
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
    """Check that TensorBoard can be imported: the version alone does not reveal a broken installation."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # a broken installation can raise any exception
        fix = f"`{sys.executable} -m pip install --force-reinstall tensorboard`"
        return Finding("TensorBoard", "fail", f"cannot be imported: {type(error).__name__}: {error}", fix)
    return Finding("TensorBoard", "ok", f"{metadata.version('tensorboard')}, {SummaryWriter.__name__} can be imported")


def compiler(setting: bool | str, accelerator: str) -> Finding:
    """Check what torch.compile needs, if the run uses it.

    Args:
        setting: ``run.compile``.
    """
    import torch

    from ds_gpt2.distributed import torch_compile

    if setting is False or (setting == "auto" and accelerator == "cpu"):
        return Finding("compiler", "ok", f"not needed: run.compile is {str(setting).lower()}")
    if (missing := torch_compile.missing_requirement(torch.device(accelerator))) is None:
        return Finding("compiler", "ok", "the model will be compiled")
    if setting is True:
        return Finding("compiler", "fail", f"run.compile is true, but {missing[0]}", missing[1])
    found = f"the model will not be compiled, training will be slower: {missing[0]}"
    return Finding("compiler", "warn", found, missing[1])


def terminal_tools() -> list[str]:
    """Return which programs that keep a run alive without a terminal are installed."""
    return [tool for tool in ("tmux", "screen", "systemd-run") if shutil.which(tool)]


def read_ranges(pyproject: Path) -> tuple[SpecifierSet, list[Requirement]]:
    """Return ``requires-python`` and ``dependencies``.

    Regular expressions find them: Python 3.10 has no TOML parser.

    Raises:
        ValueError: one of them is missing.
    """
    text = pyproject.read_text(encoding="utf-8")
    python = re.search(r'^requires-python = "([^"]+)"', text, re.MULTILINE)
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if python is None or block is None:
        raise ValueError(f"{pyproject} has no requires-python or no dependencies")
    return SpecifierSet(python[1]), [Requirement(word) for word in re.findall(r'"([^"]+)"', block[1])]


def _misfit(requirement: Requirement) -> Finding | None:
    fix = f'`{sys.executable} -m pip install "{requirement}"`'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "fail", "not installed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return Finding(requirement.name, "warn", f"{version} is outside the tested range {requirement.specifier}", fix)
