"""Command-line arguments that several verbs share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number above zero, as a type for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb that starts ranks takes."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--num_gpus", type=positive, metavar="N", help="ranks (default: every GPU, or 4 on the CPU)")
