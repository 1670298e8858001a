"""Expand ``~`` and ``$VARIABLE`` in paths of the user, and remove ``..``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ds_gpt2.common.errors import UserError


def expanded(name: str, text: str) -> str:
    """Return ``text`` with ``~`` replaced by the home directory and ``$VARIABLE`` by its value.

    Args:
        name: the setting or argument, for the error message.

    Raises:
        UserError: a variable is not set, or a user is unknown.
    """
    if (literal := re.match(r"(/[^$]*\$[^/]*)", text)) is not None and os.path.lexists(literal[1]):
        return text  # the name of the directory contains a dollar sign
    text = os.path.expandvars(text)
    if unset := re.search(r"\$(\w+|\{[^}]*\}?)", text):
        raise UserError(f"{name}={text}: the environment variable {unset[0]} is not set")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UserError(f"{name}={text}: there is no home directory of {text.partition('/')[0]}") from None


def absolute(path: str | Path, base: Path | None = None) -> Path:
    """Return ``path`` as an absolute path without ``..`` that denotes the same file.

    A symbolic link is resolved only if ``..`` follows it: there ``link/..`` is the parent of the link's target.

    Args:
        base: the directory that a relative path is relative to (default: the working directory).
    """
    full = Path(base or "", path).absolute()
    if os.pardir not in full.parts:
        return full
    textual = Path(os.path.normpath(full))
    if os.path.realpath(textual) == os.path.realpath(full):
        return textual
    after = len(full.parts) - full.parts[::-1].index(os.pardir)  # the parts after the last ..
    return Path(os.path.realpath(Path(*full.parts[:after])), *full.parts[after:])
