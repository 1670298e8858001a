"""Paths as people write them: with ``~`` for a home directory and ``$VARIABLE`` for a value of the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ds_gpt2.common.errors import UserError


def expanded(name: str, text: str) -> str:
    """Return ``text`` with the home directory for ``~`` and the environment's values for ``$VARIABLE``.

    Args:
        name: of the setting or argument, for the error.

    Raises:
        UserError: a variable that is not set, or an unknown user.
    """
    if (known := re.match(r"(/[^$]*\$[^/]*)", text)) is not None and os.path.lexists(known[1]):
        return text  # a directory whose name has a dollar sign
    text = os.path.expandvars(text)
    if unset := re.search(r"\$(\w+|\{[^}]*\}?)", text):
        raise UserError(f"{name}={text}: the environment variable {unset[0]} is not set")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UserError(f"{name}={text}: there is no home directory of {text.partition('/')[0]}") from None
