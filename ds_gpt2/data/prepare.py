"""A source to a dataset directory: cut into pieces, tokenised on all cores, held out, sharded, indexed.

The directory appears under its name when it is whole. Until then it is ``<name>.unfinished``, with a note of how far it
has come; whatever ends a preparation, the same command goes on from there, and the result is the same to the last byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds_gpt2 import machine, tokenizer
from ds_gpt2.data.dataset import INDEX, Dataset, Shard, Split, index_of, open_dataset
from ds_gpt2.data.encoder import Encoder
from ds_gpt2.data.holdout import EveryPiece, Holdout
from ds_gpt2.data.pieces import Counts, Piece, Place, pieces_of, with_next
from ds_gpt2.data.shard_writer import SplitWriter, Written
from ds_gpt2.data.shards import TOKEN_BYTES, Tokens
from ds_gpt2.data.sources import Source
from ds_gpt2.errors import UserError
from ds_gpt2.wording import size
from ds_gpt2.wording import tokens as words

UNFINISHED = ".unfinished"

_NOTE, _LOCK = "progress.json", "lock"
_NOTE_SECONDS = 0.2  # at least; more where noting takes more than a twentieth of the time
_FORMAT = 2


@dataclass(frozen=True)
class Recipe:
    """How a source becomes a dataset, its workers apart, which change nothing."""

    holdout: Holdout = field(default_factory=lambda: EveryPiece(50))
    shard_tokens: int = 100_000_000
    tokens: int | None = None  # of both splits together; None: all there are


@dataclass
class _Progress:
    """How far a preparation has come; what was written after it is cut back."""

    place: Place = field(default_factory=Place)
    pieces: int = 0
    previous: Split | None = None  # where the piece before went
    counts: Counts = field(default_factory=Counts)
    splits: dict[Split, Written] = field(default_factory=lambda: {"val": Written(), "train": Written()})

    @property
    def tokens(self) -> int:
        return sum(written.total for written in self.splits.values())


def prepare(
    source: Source, out: Path, recipe: Recipe | None = None, *, workers: int | None = None, progress: bool = True
) -> Dataset:
    """Write ``source`` as shards and ``dataset.json`` into ``out``, or go on with that.

    An <|endoftext|> precedes each document, and each piece whose predecessor went to the other split.

    Raises:
        UserError: ``out`` exists, another process writes it, what is unfinished there is of something else, the disk
            has no room, the source cannot be read, or there is too little text for both splits.
    """
    with unfinished(out) as directory:
        made = _Preparation(source, directory, recipe or Recipe()).run(workers or machine.usable_cores(), progress)
        if made is None:
            shutil.rmtree(directory)
            raise UserError("too little text for training and validation: give more")
        publish(directory, out, *made)
    return open_dataset(out)


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The directory that will be ``out``, for this process alone.

    Raises:
        UserError: ``out`` exists, another process is at it, or it cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: remove it, or give another --out DIR")
    directory = out.with_name(out.name + UNFINISHED)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    with machine.lock(directory / _LOCK, f"{directory}"):
        yield directory


def publish(directory: Path, out: Path, shards: list[Shard], index: str) -> None:
    """Give a whole dataset its index and its name; what else lies there is removed."""
    _write_durably(directory / INDEX, index)
    wanted = {INDEX, *(shard.file for shard in shards)}
    for other in directory.iterdir():
        if other.name not in wanted:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    if out.exists():
        out.rmdir()
    machine.sync_directory(directory)
    directory.rename(out)
    machine.sync_directory(out.parent)


def check_room(directory: Path, needed: float, what: str) -> None:
    """
    Raises:
        UserError: the disk has not ``needed`` bytes for ``what``.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.parent} has {size(free)} free, some {size(int(needed))} are needed for {what}: make room,"
            " give --out on another disk, or fewer --tokens"
        )


def is_prepared(out: Path) -> bool:
    """Whether ``out`` already is a dataset that ``prepare`` finished."""
    return (out / INDEX).exists()


class _Preparation:
    """One, from where it was left."""

    def __init__(self, source: Source, directory: Path, recipe: Recipe) -> None:
        self._source, self._directory, self._recipe = source, directory, recipe
        self._identity = json.loads(json.dumps({"source": source.identity(), "recipe": asdict(recipe)}))
        self._done = self._read_note()
        left = max(0.0, self._expected() - self._done.tokens)
        check_room(directory, TOKEN_BYTES * left, f"{words(left)} tokens")
        self._writers: dict[Split, SplitWriter] = {
            split: SplitWriter(directory, split, recipe.shard_tokens, written)
            for split, written in self._done.splits.items()
        }
        self._next_note = time.monotonic() + _NOTE_SECONDS

    def run(self, workers: int, progress: bool) -> tuple[list[Shard], str] | None:
        """To the end; the shards and their index. None if there is nothing for one of the splits."""
        try:
            with Encoder(workers) as encoder, self._bar(progress) as bar:
                texts = ((piece.text, (piece, counts)) for piece, counts in pieces_of(self._source, self._done.place))
                for ((piece, counts), tokens), following in with_next(encoder.encode(texts)):
                    is_last = following is None or not following[0][0].text
                    bar.update(self._take(piece, counts, tokens, is_last))
                    if self._is_full():
                        break
                    self._note_now_and_then()
            shards = [shard for writer in self._writers.values() for shard in writer.close()]
        finally:
            for writer in self._writers.values():
                writer.abandon()
        if {shard.split for shard in shards} != {"train", "val"}:
            return None
        return shards, index_of(shards, self._source.name, asdict(self._done.counts))

    def _take(self, piece: Piece, counts: Counts, tokens: Tokens, is_last: bool) -> int:
        """Write one piece; returns how many tokens that came to."""
        done, before = self._done, self._done.tokens
        _add(done.counts, counts)
        done.place = piece.then
        if not piece.text:
            return 0
        done.pieces += 1
        held_out = done.splits["val"].total
        split, most = self._recipe.holdout.split_of(done.pieces, is_last, held_out)
        separate = piece.begins_document or split != done.previous
        tokens = _headed(tokens) if separate else tokens
        self._write(split, tokens[:most])
        done.previous = split
        if most is not None and len(tokens) > most:
            done.previous = "train" if split == "val" else "val"
            self._write(done.previous, _headed(tokens[most:]))
        return done.tokens - before

    def _write(self, split: Split, tokens: Tokens) -> None:
        if self._recipe.tokens is not None:
            tokens = tokens[: self._recipe.tokens - self._done.tokens]
        self._writers[split].write(tokens)

    def _is_full(self) -> bool:
        return self._recipe.tokens is not None and self._done.tokens >= self._recipe.tokens

    def _note_now_and_then(self) -> None:
        begun = time.monotonic()
        if begun < self._next_note:
            return
        for writer in self._writers.values():
            writer.sync()
        machine.sync_directory(self._directory)
        splits = {split: written.to_dict() for split, written in self._done.splits.items()}
        note = {"format": _FORMAT, "identity": self._identity, **asdict(self._done), "splits": splits}
        _write_durably(self._directory / _NOTE, json.dumps(note))
        now = time.monotonic()
        self._next_note = now + max(_NOTE_SECONDS, 20 * (now - begun))

    def _read_note(self) -> _Progress:
        """
        Raises:
            UserError: what is there is of another source or recipe.
        """
        try:
            note = json.loads((self._directory / _NOTE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Progress()
        if note["format"] != _FORMAT or note["identity"] != self._identity:
            raise UserError(
                f"{self._directory} is unfinished, of another text or with other options: remove it to begin anew,"
                " or give another --out DIR"
            )
        splits = {split: Written.from_dict(written) for split, written in note["splits"].items()}
        return _Progress(Place(**note["place"]), note["pieces"], note["previous"], Counts(**note["counts"]), splits)

    def _expected(self) -> float:
        """Tokens that there will be, about."""
        return min(self._source.tokens, self._recipe.tokens or self._source.tokens)

    def _bar(self, progress: bool) -> tqdm[Any]:
        silent = not (progress and sys.stderr.isatty())
        return tqdm(
            desc="tokenising",
            unit="tok",
            unit_scale=True,
            disable=silent,
            initial=self._done.tokens,
            total=round(self._expected()) or None,
        )


def _headed(tokens: Tokens) -> Tokens:
    return np.concatenate((np.array([tokenizer.END_OF_TEXT], np.uint16), tokens))


def _add(total: Counts, more: Counts) -> None:
    total.documents += more.documents
    total.empty += more.empty
    total.null += more.null


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
