"""``./launch.sh VERB``, that is ``python -m ds_gpt2 VERB``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ds_gpt2 import __version__
from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError, is_wrong_path
from ds_gpt2.run_dir import exit_report


@dataclass(frozen=True)
class _Verb:
    """What a verb does. No module but the one asked for is imported: ``status`` is not to wait for ``report``."""

    summary: str
    module: str  # in ds_gpt2.commands
    run: str = "run"  # the function that does it: options -> exit code
    add_arguments: str = "add_arguments"

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"ds_gpt2.commands.{self.module}"), name)


_VERBS = {
    "quickstart": _Verb("sample data, then train a small GPT-2: five minutes", "quickstart"),
    "prepare": _Verb("text to token shards", "prepare"),
    "doctor": _Verb("is this machine ready for the run? every check, with the mend", "doctor"),
    "inspect": _Verb("what is in a directory of data: counts, lengths, examples", "inspect"),
    "plan": _Verb("what a run will take: memory, time, disk, energy; a few real steps are run", "plan"),
    "drill": _Verb("the rehearsal: what may go wrong is done on purpose, to a run like yours", "drill"),
    "train": _Verb("start a run and keep it going", "train"),
    "resume": _Verb("go on with a run", "train", "resume", "add_resume_arguments"),
    "status": _Verb("how a run is now, on one small screen; exit code 1 if it is not well", "status"),
    "alert": _Verb("which ways messages go, and whether they arrive", "alert"),
    "list": _Verb("the checkpoints of a run", "checkpoints", "show", "add_list_arguments"),
    "verify": _Verb(
        "is a checkpoint, or data, as it was written? reads all", "checkpoints", "verify", "add_verify_arguments"
    ),
    "prune": _Verb(
        "delete the checkpoints that the settings do not keep", "checkpoints", "prune", "add_prune_arguments"
    ),
    "backup": _Verb("a verified copy of a checkpoint in another place", "backup"),
    "export": _Verb("a run's model for transformers, or for plain PyTorch", "export"),
    "generate": _Verb("text from a model: of a run, or exported", "generate"),
    "eval": _Verb("how good models are: loss on held-out text, HellaSwag, one table", "eval"),
    "diff": _Verb("two runs side by side: settings, losses at equal tokens, what each came to", "diff"),
    "notes": _Verb("write down, or read, what you think of a run", "notes"),
    "report": _Verb("how a run went so far, as one HTML file for any browser", "report"),
    "tensorboard": _Verb("the curves, in a browser here or far away", "tensorboard"),
}

_TRAINING = frozenset({"quickstart", "train", "resume"})  # what they print may be lost, they go on


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    terminal.make_safe()
    arguments = sys.argv[1:] if arguments is None else arguments
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = _parse(arguments)
        if options.verb in _TRAINING:
            terminal.ignore_failures()
        if options.verb == "test":
            raise UserError("the tests are started by ./launch.sh test, or by pytest")
        verb = _VERBS[options.verb]
        code = int(verb.function(verb.run)(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has seen enough, as ``head`` has; what Python still holds has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_report.CRASHED
    except OSError as error:
        if terminal.output_fails():
            terminal.ignore_failures()
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            return exit_report.CRASHED
        print(f"error: {terminal.one_line(_described(error))}", file=sys.stderr)
        return exit_report.MISTAKE if is_wrong_path(error) else exit_report.CRASHED
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        return exit_report.CRASHED
    except UserError as error:
        print(f"error: {terminal.one_line(error)}", file=sys.stderr)
        return exit_report.MISTAKE
    except UnicodeEncodeError as error:
        print(f"error: {terminal.unspeakable(error)}", file=sys.stderr)
        return exit_report.MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_report.CRASHED


def _described(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse gives up on positional words behind an option; settings may stand anywhere."""
    parser = _parser(asked_for=next((word for word in arguments if word in _VERBS), None))
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "settings") or any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # says what it does not know, and ends
    else:
        options.settings += rest
    return options


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line; ``--help`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser(asked_for: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="./launch.sh", description="Pre-train GPT-2 under DeepSpeed ZeRO-2.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ds_gpt2 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        words = verbs.add_parser(name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        if name == asked_for:
            verb.function(verb.add_arguments)(words)
    verbs.add_parser("test", help="install what the tests need and run them (done by launch.sh itself)")
    return parser
