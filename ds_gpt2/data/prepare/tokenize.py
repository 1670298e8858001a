"""One text to tokens: tiktoken's, which gigatoken finds twenty times as fast where it is installed."""

from __future__ import annotations

import functools
from importlib import metadata

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.shards import Tokens

_EVERY = 256  # texts: one of so many is tokenised by both and compared
_LONGEST_COMPARED = 1_000_000  # characters: tiktoken takes minutes for some longer words, and gives up on spaces
_RENEWED_AFTER = 64_000_000  # characters: gigatoken remembers every word that it has met
_UNPRINTED = "\t\n\r\xa0\xad\u200b\u200c\u200d\u200e\u200f\ufeff"  # frequent, and old enough


def tokenise(text: str) -> Tokens:
    """The tokens of ``text``, without any <|endoftext|>; what looks like one is text.

    Raises:
        UserError: gigatoken is not exact; or tiktoken, where it is needed, cannot do it (a million spaces in a row).
    """
    fast = _gigatoken()
    return _by_tiktoken(text) if fast is None else fast.tokenise(text)


class _Gigatoken:
    """Leaves to tiktoken what the two may not agree on, and is watched."""

    def __init__(self) -> None:
        self._texts = 0
        self._renew()

    def tokenise(self, text: str) -> Tokens:
        if not _is_known_to_both(text):
            return _by_tiktoken(text)
        tokens = self._tokenizer.encode(text).astype(np.uint16)
        self._texts += 1
        if self._texts % _EVERY == 1 and len(text) <= _LONGEST_COMPARED:
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
                " what is unfinished, `pip uninstall gigatoken`, and prepare again (slower, exact)"
            )


@functools.cache
def _gigatoken() -> _Gigatoken | None:
    try:
        import gigatoken  # noqa: F401  (of the extra "data"; whether it is there)
    except ImportError:
        return None
    tokenizer.gpt2()  # has checked the file of ranks
    return _Gigatoken()


def _is_known_to_both(text: str) -> bool:
    """Whether all characters were assigned long ago.

    The two carry tables of different years (Unicode 16 and 17), so what is a letter to one may be none to the other.
    Python's own table is older than both, and what it takes for printable is assigned.
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
            f"text of {len(text):,} characters, {text[:40]!r}..., is too much for tiktoken: {error}"
        ) from None
