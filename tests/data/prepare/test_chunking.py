"""Pieces of documents, and counts of unusual documents and characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prepare_helpers import END, joined, prepared, tokens_of

from ds_gpt2.data import tokenizer
from ds_gpt2.data.prepare.chunking import cut
from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Reading, local_source

PROSE = st.text(st.sampled_from("ab ,.\n\n\t1é€\u00a0\u2003"), max_size=200)


@given(PROSE, st.integers(1, 20))
@example("aaaaaaaaaaaa\nb \n\n c", 3)
@example("a b\u00a0 c d\n e f", 1)
def test_pieces_have_the_tokens_of_the_whole_text(text: str, characters: int) -> None:
    encoding = tokenizer.gpt2()
    pieces = list(cut(text, characters))
    assert "".join(pieces) == text
    assert joined(encoding.encode_ordinary(piece) for piece in pieces) == encoding.encode_ordinary(text)


def test_a_text_without_lines_is_cut_between_words() -> None:
    assert max(map(len, cut("word " * 20_000, 1000))) < 1010
    assert list(cut("x" * 5000, 1000)) == ["x" * 5000]


@given(PROSE, st.integers(1, 20), st.integers(1, 60))
@example("aa aaaaaaa" + "\n" * 40 + "b\nccccccccc d", 1, 17)
def test_a_document_in_blocks_has_the_pieces_of_the_whole_document(text: str, characters: int, block: int) -> None:
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    assert list(cut(blocks, characters)) == list(cut(text, characters))


@pytest.mark.slow
def test_a_document_without_lines_or_spaces_is_one_piece(tmp_path: Path) -> None:
    document = "".join(random.Random(1).choices("abcdefghij", k=3_000_000))
    prepared([document, "another"], tmp_path / "out", Recipe(EveryPiece(2)))
    assert tokenizer.gpt2().decode(tokens_of(tmp_path / "out", "train")[1:]) == document


def test_damaged_documents_are_logged_and_counted(tmp_path: Path, log_messages: list[str]) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(100)]
    lines[50:50] = ["[" * 30_000, *("{}" for _ in range(30))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    dataset = prepare(local_source([tmp_path / "x.jsonl"]), tmp_path / "out", workers=1)
    assert dataset.counts == {"documents": 100, "empty": 0, "null": 0, "unreadable": 31}
    assert log_messages[0] == f"skipped: {tmp_path / 'x.jsonl'}, line 51: not JSON (nested too deeply)"
    assert f'skipped: {tmp_path / "x.jsonl"}, line 70: no field "text", the object is empty' in log_messages
    assert len(log_messages) == 21  # further ones are only counted


def test_an_end_of_text_in_the_text_is_logged_and_counted(tmp_path: Path, log_messages: list[str]) -> None:
    (tmp_path / "x.txt").write_text("<|endoftext|>".join(f"document {number}\n" * 300 for number in range(60)))
    one = prepare(local_source([tmp_path / "x.txt"]), tmp_path / "one", workers=1)
    assert one.counts == {"documents": 1, "empty": 0, "null": 0, "endoftext": 59}
    assert len(log_messages) == 1 and "start again with --separator '<|endoftext|>'" in log_messages[0]
    split = local_source([tmp_path / "x.txt"], reading=Reading(separator="<|endoftext|>"))
    many = prepare(split, tmp_path / "many", workers=1)
    assert many.counts == {"documents": 60, "empty": 0, "null": 0} and len(log_messages) == 1
    ends = [tokens_of(tmp_path / "many", split).count(END) for split in ("train", "val")]
    assert ends == [59, 1]
