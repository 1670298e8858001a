from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer


def test_the_encoding_equals_that_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's constructor for "gpt2" runs with its download replaced by our file; r50k has the same hash."""
    hashes = []

    def our_ranks(*args: object, **kwargs: object) -> dict[bytes, int]:
        hashes.append(kwargs)
        return tokenizer.gpt2()._mergeable_ranks

    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", our_ranks)
    theirs, ours = openai_public.gpt2(), tokenizer.gpt2()
    assert hashes
    assert theirs["pat_str"] == ours._pat_str
    assert theirs["special_tokens"] == ours._special_tokens
    assert theirs["explicit_n_vocab"] == ours.n_vocab == 50_257
    source = Path(openai_public.__file__).read_text(encoding="utf-8")
    assert tokenizer._RANKS_SHA256 in source, "not the hash that tiktoken expects of these ranks"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # Published examples: OpenAI's and transformers' documentation of GPT-2.
        ("Hello world", [15496, 995]),
        (" Hello world", [18435, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("\n\n", [628]),
        ("", []),
    ],
)
def test_tokens_of_known_texts(text: str, tokens: list[int]) -> None:
    assert tokenizer.gpt2().encode_ordinary(text) == tokens


def test_end_of_text_is_special_only_when_allowed() -> None:
    encoding = tokenizer.gpt2()
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50_256] == [tokenizer.END_OF_TEXT]
    assert 50_256 not in encoding.encode_ordinary("<|endoftext|>")


@given(st.text())
def test_decoding_restores_any_unicode_text(text: str) -> None:
    encoding = tokenizer.gpt2()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_a_damaged_vocabulary_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "gpt2.tiktoken"
    damaged.write_bytes(tokenizer.RANKS.read_bytes()[:-5])
    monkeypatch.setattr(tokenizer, "RANKS", damaged)
    tokenizer.gpt2.cache_clear()
    try:
        with pytest.raises(UserError, match="damaged"):
            tokenizer.gpt2()
    finally:
        tokenizer.gpt2.cache_clear()
