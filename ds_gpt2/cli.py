"""The command line: ``./launch.sh VERB``, which is ``python -m ds_gpt2 VERB``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from ds_gpt2 import __version__
from ds_gpt2.common import terminal
from ds_gpt2.common.errors import UserError, is_wrong_path
from ds_gpt2.run_dir import exit_codes


@dataclass(frozen=True)
class _Verb:
    """A verb and its module, which is imported only if the verb is used, so that fast commands start fast."""

    summary: str
    module: str  # in ds_gpt2.commands
    run: str = "run"  # the function that runs it: options -> exit code
    add_arguments: str = "add_arguments"

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"ds_gpt2.commands.{self.module}"), name)


_VERBS = {
    "quickstart": _Verb("prepare sample data and train a small GPT-2 on it (five minutes)", "quickstart"),
    "prepare": _Verb("convert text to token shards", "prepare"),
    "doctor": _Verb("check this machine before a run and suggest fixes", "doctor"),
    "inspect": _Verb("show what a dataset contains: counts, lengths, examples", "inspect"),
    "plan": _Verb("estimate memory, time, disk and energy of a run from a few real steps", "plan"),
    "drill": _Verb("inject faults into a scaled-down copy of your run and verify recovery", "drill"),
    "train": _Verb("start a run and restart it after failures", "train"),
    "resume": _Verb("resume a run", "train", "resume", "add_resume_arguments"),
    "status": _Verb("show the state of a run on one screen; exit code 1 if it is unhealthy", "status"),
    "alert": _Verb("list the alert channels of a run, or send a test message", "alert"),
    "list": _Verb("list the checkpoints of a run", "checkpoints", "show", "add_list_arguments"),
    "verify": _Verb(
        "verify the checksums of checkpoints or of a dataset", "checkpoints", "verify", "add_verify_arguments"
    ),
    "prune": _Verb(
        "delete the checkpoints that no retention policy keeps", "checkpoints", "prune", "add_prune_arguments"
    ),
    "backup": _Verb("copy a checkpoint to a backup storage and verify it", "backup"),
    "export": _Verb("export a run's model for transformers or plain PyTorch", "export"),
    "generate": _Verb("generate text with the model of a run or an exported one", "generate"),
    "eval": _Verb("evaluate models: loss on held-out text, HellaSwag, others", "eval"),
    "diff": _Verb("compare two runs: settings, losses at equal tokens, final metrics", "diff"),
    "notes": _Verb("add notes to a run, or show them", "notes"),
    "report": _Verb("write a report of a run as one HTML file", "report"),
    "tensorboard": _Verb("start TensorBoard for runs, also over ssh", "tensorboard"),
}

_TRAINING = frozenset({"quickstart", "train", "resume"})  # continue if their output cannot be written
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    terminal.make_safe()
    arguments = sys.argv[1:] if arguments is None else arguments
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = _parse(arguments)
        if options.verb in _TRAINING:
            terminal.ignore_write_errors()
        if options.verb == "test":
            raise UserError("run the tests with ./launch.sh test, or with pytest")
        verb = _VERBS[options.verb]
        code = int(verb.function(verb.run)(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as ``head``, has closed the pipe; discard buffered output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.CRASHED
    except OSError as error:
        if terminal.is_stdout_broken():
            terminal.ignore_write_errors()
            terminal.print_error(f"the output cannot be written: {error.strerror}")
            return exit_codes.CRASHED
        terminal.print_error(_describe(error))
        return exit_codes.MISTAKE if is_wrong_path(error) else exit_codes.CRASHED
    except MemoryError:
        terminal.print_error("out of memory")
        return exit_codes.CRASHED
    except UserError as error:
        terminal.print_error(error)
        return exit_codes.MISTAKE
    except UnicodeEncodeError as error:
        terminal.print_error(terminal.encoding_error_message(error))
        return exit_codes.MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_codes.CRASHED


def _describe(error: OSError) -> str:
    """Return the file and the reason of an error."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments; options may come anywhere.

    Raises:
        UserError: the arguments are invalid.
        OSError: the help cannot be written.
        SystemExit: the help or the version was requested and printed.
    """
    parser = _parser(next((word for word in arguments if word in _VERBS), None))
    try:
        options, rest = parser.parse_known_args(parser.options_first(arguments))
    except SystemExit:  # the help or the version is printed
        sys.stdout.flush()
        raise
    if rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see `{parser.prog} {options.verb} --help`")
    return options


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse ignores a failed write."""
        (file or sys.stdout).write(self.format_help())

    def add_argument(self, *names: Any, **properties: Any) -> argparse.Action:
        """Add an argument; argparse reports one of any number of values as required if another argument is missing."""
        action = super().add_argument(*names, **properties)
        if action.nargs == argparse.ZERO_OR_MORE:
            action.required = False
        return action

    def options_first(self, words: list[str]) -> list[str]:
        """Return the words with the options before the other words: argparse expects those in one sequence.

        Raises:
            UserError: an unknown option, verb or kind.
        """
        options: list[str] = []
        others: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                others += rest
                break
            if not _is_option(word):
                if (chosen := self._subparser(word)) is not None:
                    return [*options, word, *chosen.options_first(rest)]
                others.append(word)
                continue
            options.append(word)
            name, equals, _ = word.partition("=")
            values = self._known(name).nargs
            if equals or values not in (None, argparse.OPTIONAL) or not rest:
                continue
            if not _is_option(rest[0]):
                options.append(rest.pop(0))
            elif values is None and rest[0].partition("=")[0] not in self._option_string_actions:
                self.error(f"argument {name}: if its value is {rest[0]}, write {name}={rest[0]}")
        return [*options, "--", *others] if others else options

    def _known(self, name: str) -> argparse.Action:
        """Return the option of this name."""
        known = self._option_string_actions
        if name not in known:
            self.error(f"unknown option {name}{_did_you_mean(name, known)}")
        return known[name]

    def _subparser(self, word: str) -> _Parser | None:
        """Return the parser of a verb or kind; None if this parser has none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                if word not in action.choices:
                    what = str(action.metavar).lower()
                    hint = _did_you_mean(word, action.choices) or f"; choose from {', '.join(action.choices)}"
                    self.error(f"unknown {what} {word}{hint}")
                chosen: _Parser = action.choices[word]
                return chosen
        return None


def _is_option(word: str) -> bool:
    """Return whether a word is an option and not a value, by the rules of argparse."""
    return word.startswith("-") and word != "-" and " " not in word and _NEGATIVE_NUMBER.fullmatch(word) is None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _parser(requested: str | None) -> _Parser:
    """Return the parser of all verbs; only the requested verb has its arguments."""
    parser = _Parser(prog="./launch.sh", description="Pre-train GPT-2 with DeepSpeed ZeRO-2.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ds_gpt2 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        subparser = verbs.add_parser(name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        if name == requested:
            verb.function(verb.add_arguments)(subparser)
    verbs.add_parser("test", help="install the test dependencies and run the tests")
    return parser
