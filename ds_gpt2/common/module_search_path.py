"""Restrict the module search path of a program that is started by the path of its file.

A file such as ``random.py`` in the working directory, or next to the project, must not shadow Python's own module.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path


def ignore_working_directory() -> None:
    """Remove the working directory and this project from the module search path. Call it after importing ds_gpt2."""
    package = Path(__file__).resolve().parents[1]
    ours = {"", os.getcwd(), str(Path(sys.argv[0]).resolve().parent), str(package)}
    if (package.parent / "pyproject.toml").exists():  # a checkout, not a directory of installed packages
        ours.add(str(package.parent))
    ours -= {*site.getsitepackages(), site.getusersitepackages()}
    sys.path[:] = [entry for entry in sys.path if entry not in ours]
