"""Arguments of the command line: types that verbs share, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_gpt2 import cli
from ds_gpt2.commands.arguments import positive_float
from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir import exit_codes


def test_a_positive_float_is_parsed() -> None:
    assert positive_float("--watts")("2.5e3") == 2500.0


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "many", ""])
def test_other_texts_are_refused_with_the_name_of_the_argument(text: str) -> None:
    with pytest.raises(UserError, match=f"^--watts {text}: must be a number above 0$"):
        positive_float("--watts")(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tensorboard --port 0", "argument --port: '0': must be a whole number from 1 to 65535"),
        ("prepare text a --workers x", "argument --workers: 'x': must be a whole number above 0"),
        ("train k --num_gpus 0", "argument --num_gpus: '0': must be a whole number above 0"),
        ("plan k --steps 1.5", "argument --steps: '1.5': must be a whole number above 0"),
        ("generate --temperature hot", "argument --temperature: 'hot': must be a number"),
        ("generate --top-p all", "argument --top-p: 'all': must be a number"),
        ("generate --top-k few", "argument --top-k: 'few': must be a whole number"),
        ("generate --seed -1", "argument --seed: '-1': must be a whole number of 0 or more"),
        ("drill k --seed x", "argument --seed: 'x': must be a whole number"),
        ("inspect data --seed x", "argument --seed: 'x': must be a whole number"),
        ("prepare text a --separator=", "argument --separator: must not be empty: give the text between two documents"),
    ],
)
def test_a_wrong_value_is_explained_without_names_of_the_code(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    assert cli.main(words) == exit_codes.MISTAKE
    command = " ".join(words[: 2 if words[0] == "prepare" else 1])
    assert capsys.readouterr().err == f"error: {message}; see `./launch.sh {command} --help`\n"


def test_two_hostfiles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "quickstart", "--hostfile", "a", "--hostfile", "b"]) == exit_codes.MISTAKE
    assert capsys.readouterr().err == "error: --hostfile is given twice, as a and as b: remove one\n"
    assert cli._parse(["train", "quickstart", "--hostfile", "a", "--hostfile", "a"]).hostfile == Path("a")


@pytest.mark.parametrize("verb", cli._VERBS)
def test_every_argument_has_help(verb: str) -> None:
    without = [action.dest for action in _actions(cli._parser(verb), verb) if not _is_explained(action)]
    assert without == []


def _actions(parser: argparse.ArgumentParser, verb: str | None) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its subparsers; of the verbs only of ``verb``."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                if verb in (None, name):
                    yield from _actions(subparser, None)
        else:
            yield action


def _is_explained(action: argparse.Action) -> bool:
    """Return whether there is more than the default in parentheses."""
    return bool(action.help) and not str(action.help).startswith("(")
