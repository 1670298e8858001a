"""The command line of a rank: the settings file, flags as in scripts for torchrun, and ``key=value`` overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.settings import Settings, parse_overrides

_DESCRIPTION = "Train on one rank: deepspeed --num_gpus 4 ds_gpt2/train.py --config ds_configs/gpt2_124m.yaml"

_FLAGS = {
    "run_name": "run.name",
    "checkpoint_freq": "checkpoint.every",
    "checkpoint_dir": "checkpoint.dir",
    "eval_freq": "validation.every",
    "tensorboard_dir": "monitor.dir",
    "use_tensorboard": "monitor.tensorboard",
}


@dataclass(frozen=True)
class TrainArguments:
    """A parsed command line.

    Args:
        overrides: dotted setting -> the text of its value, from flags and ``key=value``.
        resume: what to resume from; None to start a new run.
        excluded: batches to exclude from training, as text; None for none.
    """

    config: Path
    overrides: dict[str, str]
    resume: str | None
    excluded: str | None
    print_config: bool

    def settings(self, cwd: Path | None = None) -> Settings:
        """Return the settings of the run.

        Args:
            cwd: the directory that relative paths are relative to (default: the working directory).

        Raises:
            UserError: see ``settings.load_settings``.
        """
        return run_location.load((cwd or Path()) / self.config, self.overrides, cwd)


def parse(arguments: Sequence[str] | None = None) -> TrainArguments:
    """Parse a command line (default: that of this process).

    Raises:
        UserError: the command line is invalid.
        SystemExit: help was requested and printed.
    """
    options, extra = _parser().parse_known_args(arguments)
    if options.config is None:
        raise UserError("--config YAML is required, for example ds_configs/quickstart.yaml")
    for flag, default in (("resume", "latest"), ("use_tensorboard", "true")):
        value = getattr(options, flag)
        if value is not None and "=" in value:  # a setting that follows a flag without a value
            extra = [*extra, value]
            setattr(options, flag, default)
    if options.fork is not None:
        raise UserError(
            "--fork works with `./launch.sh train` only: make and start the fork there; once stopped, it can be resumed"
            " here with --resume latest"
        )
    flags = {key: value for flag, key in _FLAGS.items() if (value := getattr(options, flag)) is not None}
    overrides = {**flags, **parse_overrides(extra)}
    return TrainArguments(Path(options.config), overrides, options.resume, options.leave_out, options.print_config)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="ds_gpt2/train.py",
        description=_DESCRIPTION,
        allow_abbrev=False,
        epilog="Any setting may follow as key=value.",
    )
    result.add_argument("--config", metavar="YAML", help="the run's settings; required")
    result.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="WHERE",
        help="resume from latest, auto (latest, or a new run), backup (the checkpoint before the newest; it is not"
        " related to checkpoint.backup), before:STEP (the newest good one before a step), best, a step, an"
        " epoch (epoch_00003), a tag or a path",
    )
    result.add_argument(
        "--leave_out", metavar="BATCHES", help="batches of the data to exclude from training, such as 1200-1210,1250"
    )
    result.add_argument("--run_name", metavar="NAME", help="run.name")
    result.add_argument("--checkpoint_freq", metavar="STEPS", help="checkpoint.every")
    result.add_argument("--checkpoint_dir", metavar="DIR", help="checkpoint.dir")
    result.add_argument("--eval_freq", metavar="STEPS", help="validation.every")
    result.add_argument("--tensorboard_dir", metavar="DIR", help="monitor.dir")
    result.add_argument("--use_tensorboard", nargs="?", const="true", metavar="true|false", help="monitor.tensorboard")
    result.add_argument("--print-config", action="store_true", help="print the resulting settings and exit")
    result.add_argument("--fork", nargs="?", const="", help=argparse.SUPPRESS)  # see ``commands/train.py``
    result.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return result
