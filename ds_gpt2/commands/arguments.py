"""Command-line arguments that several verbs share."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ds_gpt2.checkpoint.manifest import Weights
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.paths import expanded


def positive(text: str) -> int:
    """Parse an integer above zero, as a type for argparse."""
    return whole_number(text, 1, "above 0")


def whole_number(text: str, least: int | None = None, limits: str = "", most: float = math.inf) -> int:
    """Parse an integer, as a type for argparse.

    Args:
        least: the smallest allowed number; None for any.
        limits: the allowed numbers, for errors.
        most: the largest allowed number.

    Raises:
        argparse.ArgumentTypeError: it is no integer, or not within the limits.
    """
    with contextlib.suppress(ValueError):
        number = int(text)
        if (least is None or number >= least) and number <= most:
            return number
    raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number {limits}".rstrip())


def number(text: str) -> float:
    """Parse a number, as a type for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number") from None


def positive_float(argument: str) -> Callable[[str], float]:
    """Return a type for argparse that parses a finite number above zero.

    Args:
        argument: its name, for errors.
    """

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (number := float(text)) < math.inf:
                return number
        raise UserError(f"{argument} {text}: must be a number above 0")

    return convert


def path(argument: str) -> Callable[[str], Path]:
    """Return a type for argparse that parses a path and expands ``~`` and ``$VARIABLE`` as in settings.

    Args:
        argument: its name, for errors.
    """
    return lambda text: Path(path_text(argument)(text))


def path_text(argument: str) -> Callable[[str], str]:
    """Return a type for argparse like ``path`` for arguments that may also be a name or a URL; it returns text."""

    def convert(text: str) -> str:
        """Expand the path.

        Raises:
            UserError: an empty text, a variable that is not set, or an unknown user.
        """
        if not text or "\0" in text:
            raise UserError(f"{argument} is an empty path: give a path")
        if "://" in text or ("$" in text and os.path.lexists(text)):  # an existing file with a dollar sign in its name
            return text
        return expanded(argument, text)

    return convert


def add_hostfile_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument of verbs that may use several machines; see ``with_hostfile``."""
    parser.add_argument(
        "--hostfile",
        action=_Once,
        type=path("--hostfile"),
        metavar="FILE",
        help="train on several machines: lines `HOST slots=N` (cluster.hostfile)",
    )


def add_fork_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that forks another run; see ``training/fork.py``."""
    parser.add_argument(
        "--fork",
        action=_Once,
        metavar="RUN[:TAG]",
        help="begin a new run, run.name=NEW, with the full state of a checkpoint of another run. TAG: as for `resume"
        " --from` (default: the newest good checkpoint). With --auto, a fork that exists already is resumed",
    )


class _Once(argparse.Action):
    """Store the value of an option that must not be given with two values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        """Store ``value``.

        Raises:
            UserError: there is another value already.
        """
        if (earlier := getattr(namespace, self.dest)) not in (None, value):
            raise UserError(f"{option} is given twice, as {earlier} and as {value}: remove one")
        setattr(namespace, self.dest, value)


def with_hostfile(overrides: dict[str, str], hostfile: Path | None) -> dict[str, str]:
    """Return the overrides with ``--hostfile`` as the setting that it stands for.

    Raises:
        UserError: both are given, with different values.
    """
    if hostfile is None:
        return overrides
    if overrides.get("cluster.hostfile", str(hostfile)) != str(hostfile):
        raise UserError(f"--hostfile {hostfile} and cluster.hostfile={overrides['cluster.hostfile']}: remove one")
    return {**overrides, "cluster.hostfile": str(hostfile)}


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument of verbs that read the weights of a checkpoint."""
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="raw",
        help="raw: of the last update (default); ema: their moving average, if the run has ema.decay",
    )


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every verb that starts ranks."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of the file")
    parser.add_argument(
        "--num_gpus", type=positive, metavar="N", help="number of ranks (default: every GPU, or 4 on the CPU)"
    )
