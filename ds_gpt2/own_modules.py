"""Keep a program that is started by the path of its file from importing other people's files as modules.

``random.py`` in the working directory, or beside the project, must not take the place of Python's own module.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def ignore_working_directory() -> None:
    """Remove the working directory and this project from the module search path; the package itself is loaded."""
    package = Path(__file__).resolve().parent
    script = str(Path(sys.argv[0]).resolve().parent)
    ours = {"", os.getcwd(), script, str(package), str(package.parent)}
    sys.path[:] = [entry for entry in sys.path if entry not in ours]
