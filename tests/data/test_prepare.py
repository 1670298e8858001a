import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ds_gpt2 import tokenizer
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.prepare import cut, prepare
from ds_gpt2.data.shards import open_shard
from ds_gpt2.errors import UserError

END = tokenizer.END_OF_TEXT


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


PROSE = st.text(st.sampled_from("ab ,.\n\n\t1é€\u00a0\u2003"), max_size=200)


@given(PROSE, st.integers(1, 20))
@example("aaaaaaaaaaaa\nb \n\n c", 3)
def test_cutting_does_not_change_the_tokens(text: str, characters: int) -> None:
    encoding = tokenizer.gpt2()
    pieces = list(cut(text, characters))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.begins_document for piece in pieces] == [number == 0 for number in range(len(pieces))]
    assert _joined(encoding.encode_ordinary(piece.text) for piece in pieces) == encoding.encode_ordinary(text)


def _tokens(directory: Path, split: str) -> list[int]:
    dataset = open_dataset(directory)
    shards = [open_shard(dataset.dir / shard.file) for shard in dataset.shards if shard.split == split]
    return np.concatenate(shards).tolist()


def test_documents_become_tokens_behind_end_of_text(tmp_path: Path) -> None:
    documents = [f"Document number {number}." for number in range(10)]
    prepare(documents, tmp_path / "out", source="test", validation_every=5)
    encoded = [[END, *tokenizer.gpt2().encode_ordinary(text)] for text in documents]
    held_out = [encoded[4], encoded[9]]
    assert _tokens(tmp_path / "out", "val") == _joined(held_out)
    assert _tokens(tmp_path / "out", "train") == _joined(text for text in encoded if text not in held_out)


def test_one_long_document_is_held_out_in_part(tmp_path: Path) -> None:
    text = "\n".join(f"Line {number} of a long document." for number in range(5000))
    prepare([text], tmp_path / "out", source="test")
    train, val = (_tokens(tmp_path / "out", split) for split in ("train", "val"))
    assert train.count(END) == val.count(END) == 1
    assert tokenizer.gpt2().decode(train[1:] + val[1:]) == text


def test_a_stretch_after_a_held_out_one_begins_anew(tmp_path: Path) -> None:
    text = "\n".join(f"Line {number} of a long document." for number in range(5000))
    prepare([text], tmp_path / "out", source="test", validation_every=3)
    train, val = (_tokens(tmp_path / "out", split) for split in ("train", "val"))
    assert train.count(END) == 1 + val.count(END)


def test_shards_are_filled_to_the_last_token(tmp_path: Path) -> None:
    documents = [f"{number} words and more words" for number in range(400)]
    small, large = tmp_path / "small", tmp_path / "large"
    prepare(documents, small, source="test", shard_tokens=500)
    prepare(documents, large, source="test")
    sizes = [shard.tokens for shard in open_dataset(small).split("train")]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {500}
    assert _tokens(small, "train") == _tokens(large, "train")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_result_does_not_depend_on_the_workers(tmp_path: Path, workers: int, dataset_dir: Path) -> None:
    documents = [f"{number} " * number for number in range(1, 400)]
    one, many = tmp_path / "one", tmp_path / "many"
    prepare(documents, one, source="test", workers=1)
    prepare(documents, many, source="test", workers=workers)
    assert open_dataset(one).fingerprint == open_dataset(many).fingerprint


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    prepare(["", "one", " \n", "two", "three"], tmp_path / "out", source="test", validation_every=3)
    assert _tokens(tmp_path / "out", "train").count(END) == 2


@pytest.mark.parametrize("documents", [[], ["", "  "], ["only one"]])
def test_too_little_text_leaves_nothing_behind(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(UserError, match="too little text"):
        prepare(documents, tmp_path / "out", source="test")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        prepare(["one", "two"], tmp_path, source="test")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def documents():
        yield from (f"document {number}" for number in range(1000))
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        prepare(documents(), tmp_path / "out", source="test")
    assert list(tmp_path.iterdir()) == []
