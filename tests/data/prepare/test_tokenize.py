"""gigatoken gives the tokens of tiktoken, and differences are detected."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.prepare import tokenize as module
from ds_gpt2.data.prepare.tokenize import tokenize

gigatoken = pytest.importorskip("gigatoken", reason="an optional package; tiktoken is used without it")

AWKWARD = st.sampled_from(
    " ~\t~\n~\r~'~.~,~<~>~|~-~_~0~1~9~  ~'s~'LL~'ve~don't~<|endoftext|>~\u00a0~\u2003~\u0085~\x1c~\xe9~\xdf~\u4e2d"
    "~\U0001f44d~\U0001f468\u200d\U0001f469~\u0301~\u200d~\u0663~\xbd~\u2167~\ufeff~\x00~\ud800~\U000323b0~\U0001d518"
    "~word~ word~Words~aaaa~https://www.".split("~")
)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    module._gigatoken.cache_clear()
    yield
    module._gigatoken.cache_clear()


@settings(max_examples=400)
@given(st.text(max_size=300) | st.lists(AWKWARD, max_size=40).map("".join))
@example("half \ud800 of a pair")
@example("\U00032ada陱")  # the first is a letter since Unicode 17
@example("x" * 100_000)
@example(" " * 100_000)
def test_tokens_equal_those_of_tiktoken(text: str) -> None:
    assert tokenize(text).tolist() == tokenizer.gpt2().encode_ordinary(text)


@pytest.mark.slow
def test_both_classify_every_character_given_to_gigatoken_equally(tmp_path: Path) -> None:
    """The tokens are pairs of a letter, digit or mark with any byte, so splits show the class of a character."""
    leads = [bytes([byte]) for byte in range(256)]
    words = leads + [before + lead for before in (b"x", b"1", b"!", b" ") for lead in leads]
    ranks = tmp_path / "toy.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))
    toy = tiktoken.Encoding(
        "toy",
        pat_str=tokenizer._SPLIT,
        mergeable_ranks={word: rank for rank, word in enumerate(words)},
        special_tokens={},
    )
    other = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2", special_tokens={})
    characters = [each for each in map(chr, range(sys.maxunicode + 1)) if module._is_known_to_both(each)]
    assert len(characters) > 140_000
    for group in (characters[start : start + 100] for start in range(0, len(characters), 100)):
        text = "".join(f"x{each}1{each}!{each} {each}" for each in group)
        assert other.encode(text).tolist() == toy.encode_ordinary(text), group


@pytest.mark.parametrize("text", ["\U000323b0", "\ue000", "a\x00é", "é\x1b[0m", "é\ud800"])
def test_characters_that_are_not_printable_use_tiktoken(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module._Gigatoken, "_compare", lambda *_: pytest.fail("gigatoken was used"))
    assert tokenize(text).tolist() == tokenizer.gpt2().encode_ordinary(text)


@pytest.mark.parametrize("wrong_at", [0, 256, 512])
def test_a_wrong_token_is_detected_in_every_256th_text(wrong_at: int) -> None:
    fast = module._gigatoken()
    assert fast is not None
    for _ in range(wrong_at):
        fast.tokenize("a text")

    class Wrong:
        def encode(self, text: str) -> Any:
            return np.array([1, 2, 3], np.uint32)

    fast._tokenizer = Wrong()  # type: ignore[assignment]  # a stand-in
    with pytest.raises(UserError, match=r"gigatoken [\d.]+ does not give GPT-2's tokens for 'a text'.*pip uninstall"):
        fast.tokenize("a text")


def test_gigatoken_is_renewed_to_limit_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RENEWED_AFTER", 1000)
    fast = module._gigatoken()
    assert fast is not None
    before = fast._tokenizer
    fast.tokenize("x" * 999)
    assert fast._tokenizer is before
    fast.tokenize("x" * 2)
    assert fast._tokenizer is not before


def test_text_that_tiktoken_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = " " * 2_000_000 + "end"
    assert tokenizer.gpt2().decode(tokenize(spaces)) == spaces
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    module._gigatoken.cache_clear()
    with pytest.raises(UserError, match=r"text of 2,000,003 characters, ' +'\.\.\., cannot be encoded by tiktoken"):
        tokenize(spaces)


def test_tiktoken_is_used_without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert tokenize("A text, é and <|endoftext|>").tolist() == tokenizer.gpt2().encode_ordinary(
        "A text, é and <|endoftext|>"
    )
