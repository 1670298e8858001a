"""Command-line arguments that several verbs share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.paths import expanded


def positive(text: str) -> int:
    """A whole number above zero, as a type for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def path(argument: str) -> Callable[[str], Path]:
    """Return a type for argparse: a path, with ``~`` and ``$VARIABLE`` expanded as in settings.

    Args:
        argument: its name, for the error.
    """
    return lambda text: Path(path_text(argument)(text))


def path_text(argument: str) -> Callable[[str], str]:
    """Return a type for argparse as ``path`` does, for words that may also be a name or a URL; it returns text."""

    def convert(text: str) -> str:
        """
        Raises:
            UserError: nothing, a variable that is not set, or an unknown user.
        """
        if not text or "\0" in text:
            raise UserError(f"{argument} is an empty path: give a path")
        if "://" in text or ("$" in text and os.path.lexists(text)):  # a file whose name has a dollar sign
            return text
        return expanded(argument, text)

    return convert


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that starts ranks takes."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--num_gpus", type=positive, metavar="N", help="ranks (default: every GPU, or 4 on the CPU)")
