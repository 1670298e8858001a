"""Documents to a dataset directory: cut into pieces, tokenised on all cores, held out, sharded, indexed."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ds_gpt2 import tokenizer
from ds_gpt2.data.dataset import INDEX, Dataset, Shard, Split, open_dataset, write_index
from ds_gpt2.data.shards import ShardWriter, Tokens, sha256
from ds_gpt2.errors import UserError
from ds_gpt2.machine import usable_cores

PIECE_CHARACTERS = 16_384
_PIECES_AT_ONCE = 256


@dataclass(frozen=True)
class Piece:
    """A stretch of one document; whole documents are one piece unless they are long."""

    text: str
    begins_document: bool


def prepare(
    documents: Iterable[str],
    out: Path,
    *,
    source: str,
    validation_every: int = 50,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Write ``documents`` as shards and ``dataset.json`` into ``out``, which appears only when it is whole.

    Every ``validation_every``-th piece is held out for validation (the last one if there are fewer). An
    <|endoftext|> precedes each document, and each piece whose predecessor went to the other split.

    Raises:
        UserError: ``out`` exists already, or there is too little text for both splits.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: remove it, or give another --out DIR")
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        shards = _write_shards(partial, documents, validation_every, shard_tokens, workers, progress)
        write_index(partial, shards, source)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_dataset(out)


def is_prepared(out: Path) -> bool:
    """Whether ``out`` already is a dataset that ``prepare`` finished."""
    return (out / INDEX).exists()


def cut(document: str, characters: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Cut a long document where tokens cannot straddle: before a newline between two printing characters.

    GPT-2's split gives such a newline a token of its own, so the pieces' tokens are the whole document's.
    """
    start = 0
    while len(document) - start > characters:
        found = re.compile(r"(?<=\S)\n(?=\S)").search(document, start + characters)
        if found is None:
            break
        yield Piece(document[start : found.start()], begins_document=start == 0)
        start = found.start()
    if document[start:]:
        yield Piece(document[start:], begins_document=start == 0)


def _write_shards(
    directory: Path,
    documents: Iterable[str],
    validation_every: int,
    shard_tokens: int,
    workers: int | None,
    progress: bool,
) -> list[Shard]:
    writers: dict[Split, _SplitWriter] = {
        "val": _SplitWriter(directory, "val", shard_tokens),
        "train": _SplitWriter(directory, "train", shard_tokens),
    }
    pieces = (piece for document in documents if document.strip() for piece in cut(document))
    previous: Split | None = None
    silent = not (progress and sys.stderr.isatty())
    with tqdm(unit="tok", unit_scale=True, desc="tokenising", disable=silent) as bar:
        for number, (piece, tokens, is_last) in enumerate(_tokenised(pieces, workers), start=1):
            held_out = number % validation_every == 0 or (is_last and number < validation_every and number > 1)
            split: Split = "val" if held_out else "train"
            separate = piece.begins_document or split != previous
            writers[split].write(np.concatenate(([tokenizer.END_OF_TEXT], tokens)) if separate else tokens)
            previous = split
            bar.update(len(tokens))
    shards = [shard for writer in writers.values() for shard in writer.close()]
    if {shard.split for shard in shards} != {"train", "val"}:
        raise UserError(f"too little text for training and validation: give more than {PIECE_CHARACTERS} characters")
    return shards


def _tokenised(pieces: Iterator[Piece], workers: int | None) -> Iterator[tuple[Piece, Tokens, bool]]:
    """Each piece with its tokens and whether it is the last. tiktoken encodes outside the GIL, so threads suffice."""
    threads = workers or usable_cores()
    encoding = tokenizer.gpt2()
    batch = list(itertools.islice(pieces, _PIECES_AT_ONCE))
    while batch:
        following = list(itertools.islice(pieces, _PIECES_AT_ONCE))
        encoded = encoding.encode_ordinary_batch([piece.text for piece in batch], num_threads=threads)
        for place, (piece, tokens) in enumerate(zip(batch, encoded, strict=True), start=1):
            yield piece, np.array(tokens, np.uint16), not following and place == len(batch)
        batch = following


class _SplitWriter:
    """Numbers the shards of one split and begins a new one when the current is full."""

    def __init__(self, directory: Path, split: Split, shard_tokens: int) -> None:
        self._directory = directory
        self._split: Split = split
        self._shard_tokens = shard_tokens
        self._current: ShardWriter | None = None
        self._done: list[Shard] = []

    def write(self, tokens: Tokens) -> None:
        while len(tokens):
            if self._current is None:
                self._current = ShardWriter(self._directory / f"{self._split}_{len(self._done):06d}.bin")
            room = self._shard_tokens - self._current.tokens
            self._current.write(tokens[:room])
            tokens = tokens[room:]
            if self._current.tokens == self._shard_tokens:
                self._finish()

    def close(self) -> list[Shard]:
        if self._current is not None:
            self._finish()
        return self._done

    def _finish(self) -> None:
        assert self._current is not None
        self._current.close()
        path, tokens = self._current.path, self._current.tokens
        self._done.append(Shard(path.name, self._split, tokens, path.stat().st_size, sha256(path)))
        self._current = None
