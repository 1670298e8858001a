"""Run a program of the system and return what it prints."""

from __future__ import annotations

import os
import subprocess


def output_of(*command: str, timeout: float) -> str | None:
    """Return the standard output of ``command``, in the C locale.

    Return None if the program is not installed, fails, or takes longer than ``timeout`` seconds.
    """
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
