"""Tokenize a text with tiktoken or, if it is installed, with gigatoken, which is twenty times as fast."""

from __future__ import annotations

import functools
from importlib import metadata

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.shards import Tokens

_COMPARED_EVERY = 256  # texts: one of this many is tokenized by both libraries and compared
_LONGEST_COMPARED = 1_000_000  # characters: tiktoken takes minutes for some longer words, and fails on spaces
_RENEWED_AFTER = 64_000_000  # characters: gigatoken caches every word
_UNPRINTED = "\t\n\r\xa0\xad\u200b\u200c\u200d\u200e\u200f\ufeff"  # frequent, and known to both libraries


def tokenize(text: str) -> Tokens:
    """Return the tokens of ``text``, (n,) uint16. The text <|endoftext|> is encoded as ordinary characters.

    Raises:
        UserError: gigatoken's tokens are wrong, or tiktoken, where it is needed, fails (on a million spaces in a row).
    """
    fast = _gigatoken()
    return _by_tiktoken(text) if fast is None else fast.tokenize(text)


class _Gigatoken:
    """Tokenizes with gigatoken, except texts on which it may differ from tiktoken; compares a sample of the others."""

    def __init__(self) -> None:
        self._texts = 0
        self._renew()

    def tokenize(self, text: str) -> Tokens:
        if not _is_known_to_both(text):
            return _by_tiktoken(text)
        tokens = self._tokenizer.encode(text).astype(np.uint16)
        self._texts += 1
        if self._texts % _COMPARED_EVERY == 1 and len(text) <= _LONGEST_COMPARED:
            self._compare(text, tokens)
        self._characters += len(text)
        if self._characters > _RENEWED_AFTER:
            self._renew()
        return tokens

    def _renew(self) -> None:
        from gigatoken import Tokenizer

        self._tokenizer = Tokenizer.from_tiktoken(tokenizer.RANKS, pretokenizer="gpt2", special_tokens={})
        self._characters = 0

    def _compare(self, text: str, tokens: Tokens) -> None:
        if not np.array_equal(tokens, _by_tiktoken(text)):
            raise UserError(
                f"gigatoken {metadata.version('gigatoken')} does not give GPT-2's tokens for {text[:60]!r}...: remove"
                " the unfinished directory, `pip uninstall gigatoken`, and prepare again (slower, but exact)"
            )


@functools.cache
def _gigatoken() -> _Gigatoken | None:
    try:
        import gigatoken  # noqa: F401  (only whether it is installed; in the extra "data")
    except ImportError:
        return None
    tokenizer.gpt2()  # checks the file of ranks
    return _Gigatoken()


def _is_known_to_both(text: str) -> bool:
    """Return whether both libraries know all characters.

    They use different versions of Unicode (16 and 17), so they may classify a new character differently. Python's own
    version is older than both, and every character that it considers printable is assigned.
    """
    if text.isascii():
        return True
    for character in _UNPRINTED:
        text = text.replace(character, " ")
    return text.isprintable()


def _by_tiktoken(text: str) -> Tokens:
    encoding = tokenizer.gpt2()
    try:
        return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    except UnicodeEncodeError:  # half of a surrogate pair
        return np.array(encoding.encode_ordinary(text), np.uint16)
    except ValueError as error:
        raise UserError(
            f"text of {len(text):,} characters, {text[:40]!r}..., cannot be encoded by tiktoken: {error}"
        ) from None
