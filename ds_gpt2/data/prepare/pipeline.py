"""A source to a dataset directory: cut into pieces, tokenised on all cores, held out, sharded, indexed.

Until the dataset is whole its directory is an unfinished one (see ``output``), with a note of the progress. Whatever
ends a preparation, the same command continues from there, and the result is the same to the last byte.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds_gpt2.common import files, host, safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.common.formatting import tokens as words
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import INDEX, Dataset, Shard, Split, index_content, open_dataset
from ds_gpt2.data.dataset import UNFINISHED as UNFINISHED
from ds_gpt2.data.prepare.chunking import Counts, Piece, Position, pieces_of, with_next
from ds_gpt2.data.prepare.holdout import EveryPiece, Holdout
from ds_gpt2.data.prepare.output import NOTE, check_room, publish, unfinished
from ds_gpt2.data.prepare.shard_writer import SplitWriter, Written, is_there
from ds_gpt2.data.prepare.sources import Source
from ds_gpt2.data.prepare.worker_pool import Encoder
from ds_gpt2.data.shards import TOKEN_BYTES, Tokens

log = logging.getLogger(__name__)

_NOTE_SECONDS = 0.2  # at least; more where noting takes more than a twentieth of the time
_FORMAT = 2
_READER = 2  # of text; a note without it was written by an earlier version


@dataclass(frozen=True)
class Recipe:
    """How a source becomes a dataset, its workers apart, which change nothing."""

    holdout: Holdout = field(default_factory=lambda: EveryPiece(50))
    shard_tokens: int = 100_000_000
    tokens: int | None = None  # of both splits together; None: all there are


@dataclass
class _Progress:
    """How far a preparation has come; what was written after it is cut back."""

    place: Position = field(default_factory=Position)
    pieces: int = 0
    previous: Split | None = None  # where the piece before went
    counts: Counts = field(default_factory=Counts)
    splits: dict[Split, Written] = field(default_factory=lambda: {"val": Written(), "train": Written()})
    separated: bool = False  # whether --separator has occurred

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
        preparation = _Preparation(source, directory, recipe or Recipe())
        made = preparation.run(workers or host.usable_cores(), progress)
        if made is None:
            shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the lock, which is open, under another name
            raise UserError(preparation.why_too_little())
        publish(directory, out, *made)
    return open_dataset(out)


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
                    is_last = following is None or not following[0][0].text or self._would_fill(tokens)
                    bar.update(self._take(piece, counts, tokens, is_last))
                    if self._is_full():
                        break
                    self._note_now_and_then()
            self._note_separator()
            if self._source.separator is not None and not self._done.separated:
                log.warning(_never(self._source.separator.text))
            shards = [shard for writer in self._writers.values() for shard in writer.close()]
        finally:
            for writer in self._writers.values():
                writer.abandon()
        if {shard.split for shard in shards} != {"train", "val"}:
            return None
        return shards, index_content(shards, self._source.name, self._done.counts.to_dict())

    def why_too_little(self) -> str:
        """What is missing where ``run`` returned None."""
        done, most = self._done, self._recipe.tokens
        held_out, trained = done.splits["val"].total, done.splits["train"].total
        if held_out and not trained:
            fewer = f" or --tokens {held_out} (fewer are held out then)" if most != held_out and held_out > 1 else ""
            return f"too little text: all of its {held_out:,} tokens are held out for validation; give more{fewer}"
        if most is not None and trained >= most:
            return (
                f"--tokens {most} is too small: the first stretch of text alone has more, and nothing would be left for"
                " validation; give larger --tokens"
            )
        return (
            f"too little text for training and validation: {done.counts.documents:,} documents with {trained:,} tokens,"
            " in fewer than two stretches; give more"
        )

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

    def _would_fill(self, tokens: Tokens) -> bool:
        """Whether a piece is the last one that is taken, with <|endoftext|> before it."""
        return self._recipe.tokens is not None and self._done.tokens + 1 + len(tokens) >= self._recipe.tokens

    def _note_now_and_then(self) -> None:
        begun = time.monotonic()
        if begun < self._next_note:
            return
        self._note_separator()
        for writer in self._writers.values():
            writer.sync()
        files.sync_directory(self._directory)
        splits = {split: written.to_dict() for split, written in self._done.splits.items()}
        note = {
            "format": _FORMAT,
            "reader": _READER,
            "identity": self._identity,
            **asdict(self._done),
            "splits": splits,
        }
        replace_file(self._directory / NOTE, json.dumps(note), durable=True)
        now = time.monotonic()
        self._next_note = now + max(_NOTE_SECONDS, 20 * (now - begun))

    def _note_separator(self) -> None:
        self._done.separated |= self._source.separator is not None and self._source.separator.found

    def _read_note(self) -> _Progress:
        """
        Raises:
            UserError: what is there is of another source or recipe, or damaged.
        """
        try:
            note = safe_json.read(self._directory / NOTE)
            is_ours = note["format"] == _FORMAT and self._is_same(note)
            progress = _progress_of(note)
        except FileNotFoundError:
            return _Progress()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self._directory / NOTE} is damaged: remove {self._directory} to start again, or give another"
                " --out DIR"
            ) from None
        if not is_ours:
            raise UserError(
                f"{self._directory} is unfinished, of another text or with other options: remove it to begin anew,"
                " or give another --out DIR"
            )
        if "reader" not in note and self._reads_otherwise():
            log.warning(
                f"{self._directory} was begun by an earlier version, which reads text differently: starting again"
            )
            (self._directory / NOTE).unlink()
            return _Progress()
        _check_written(self._directory, progress)
        return progress

    def _is_same(self, note: dict[str, Any]) -> bool:
        if "reader" in note:
            return bool(note["identity"] == self._identity)
        before = [row[:3] for row in self._identity["source"]]  # how a part is read was not noted
        return bool(note["identity"] == {**self._identity, "source": before})

    def _reads_otherwise(self) -> bool:
        """Whether an earlier version found other documents in some part."""
        readings = (reading for row in self._identity["source"] for reading in row[3:])
        return any(not reading.startswith("column ") for reading in readings)

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


def _never(separator: str) -> str:
    """Return the warning that a separator does not occur."""
    escape = ""
    if "\\" in separator:
        escape = "; a backslash stands for itself: in bash, $'\\n' is a line end"
    return f"--separator {separator!r} does not occur in the text: nothing was split{escape}"


def _headed(tokens: Tokens) -> Tokens:
    return np.concatenate((np.array([tokenizer.END_OF_TEXT], np.uint16), tokens))


def _add(total: Counts, more: Counts) -> None:
    total.documents += more.documents
    total.empty += more.empty
    total.null += more.null
    total.unreadable += more.unreadable
    total.endoftext += more.endoftext
    total.replacement += more.replacement
    total.control += more.control


def _progress_of(note: dict[str, Any]) -> _Progress:
    """
    Raises:
        LookupError, TypeError, AttributeError: it is no note.
    """
    # In the order of a new preparation, which is that of the shards in the index.
    splits = {split: Written.from_dict(note["splits"][split]) for split in _Progress().splits}
    return _Progress(
        Position(**note["place"]),
        note["pieces"],
        note["previous"],
        Counts(**note["counts"]),
        splits,
        note.get("separated") is True,
    )


def _check_written(directory: Path, progress: _Progress) -> None:
    """
    Raises:
        UserError: what is noted as written is not there.
    """
    for split, written in progress.splits.items():
        if not is_there(directory, split, written):
            raise UserError(
                f"{directory} lacks tokens that {NOTE} promises: remove it to start again, or give another --out DIR"
            )
