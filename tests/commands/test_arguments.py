"""Arguments of the command line: types that verbs share, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from ds_gpt2 import cli
from ds_gpt2.commands.arguments import positive_float
from ds_gpt2.common.errors import UserError


def test_a_positive_float_is_parsed() -> None:
    assert positive_float("--watts")("2.5e3") == 2500.0


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "many", ""])
def test_other_texts_are_refused_with_the_name_of_the_argument(text: str) -> None:
    with pytest.raises(UserError, match=f"^--watts {text}: must be a number above 0$"):
        positive_float("--watts")(text)


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
