"""``./launch.sh VERB``, that is ``python -m ds_gpt2 VERB``."""

from __future__ import annotations

import argparse
import sys

from ds_gpt2 import __version__, outcome
from ds_gpt2.commands import backup, checkpoints, notes, prepare, quickstart, report, tensorboard, train
from ds_gpt2.errors import UserError

_VERBS = {
    "quickstart": (quickstart.run, quickstart.add_arguments, "sample data, then train a small GPT-2: five minutes"),
    "prepare": (prepare.run, prepare.add_arguments, "text to token shards"),
    "train": (train.run, train.add_arguments, "start a run"),
    "resume": (train.resume, train.add_resume_arguments, "go on with a run"),
    "list": (checkpoints.show, checkpoints.add_list_arguments, "the checkpoints of a run"),
    "verify": (
        checkpoints.verify,
        checkpoints.add_verify_arguments,
        "is a checkpoint as it was written? reads all of it",
    ),
    "prune": (
        checkpoints.prune,
        checkpoints.add_prune_arguments,
        "delete the checkpoints that the settings do not keep",
    ),
    "backup": (backup.run, backup.add_arguments, "a verified copy of a checkpoint in another place"),
    "notes": (notes.run, notes.add_arguments, "write down, or read, what you think of a run"),
    "report": (report.run, report.add_arguments, "how a run went so far, as one HTML file for any browser"),
    "tensorboard": (tensorboard.run, tensorboard.add_arguments, "the curves, in a browser here or far away"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parse(arguments)
    try:
        if options.verb == "test":
            raise UserError("the tests are started by ./launch.sh test, or by pytest")
        return int(_VERBS[options.verb][0](options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return outcome.MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return outcome.CRASHED


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse gives up on positional words behind an option; settings may stand anywhere."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "settings") or any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # says what it does not know, and ends
    else:
        options.settings += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./launch.sh", description="Pre-train GPT-2 under DeepSpeed ZeRO-2.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ds_gpt2 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, add_arguments, summary) in _VERBS.items():
        add_arguments(verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False))
    verbs.add_parser("test", help="install what the tests need and run them (done by launch.sh itself)")
    return parser
