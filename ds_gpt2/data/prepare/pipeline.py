"""Prepare a dataset: cut a source into pieces, tokenize them on all cores, split them, write shards and an index.

Until the dataset is complete, it is in an unfinished directory (see ``output``) with a record of its progress (see
``progress``). After an interruption the same command continues from there; the result is identical, byte for byte.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds_gpt2.common import files, host
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.common.formatting import tokens as format_tokens
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import INDEX, Dataset, Shard, Split, index_content, open_dataset
from ds_gpt2.data.prepare.chunking import Counts, Piece, pieces_of, with_next
from ds_gpt2.data.prepare.holdout import EveryPiece, Holdout
from ds_gpt2.data.prepare.output import check_free_space, publish, unfinished
from ds_gpt2.data.prepare.progress import identity_of, read_progress, write_progress
from ds_gpt2.data.prepare.shard_writer import SplitWriter
from ds_gpt2.data.prepare.sources import Source
from ds_gpt2.data.prepare.worker_pool import Encoder
from ds_gpt2.data.shards import TOKEN_BYTES, Tokens

log = logging.getLogger(__name__)

_RECORD_SECONDS = (
    0.2  # shortest interval of records of progress; longer if writing them takes more than 5 % of the time
)


@dataclass(frozen=True)
class Recipe:
    """How a source becomes a dataset. The number of workers is not part of it, as it does not affect the result."""

    holdout: Holdout = field(default_factory=lambda: EveryPiece(50))
    shard_tokens: int = 100_000_000
    tokens: int | None = None  # of both splits together; None: all


def prepare(
    source: Source, out: Path, recipe: Recipe | None = None, *, workers: int | None = None, progress: bool = True
) -> Dataset:
    """Write ``source`` as shards and ``dataset.json`` into ``out``, or continue an interrupted preparation.

    An <|endoftext|> precedes each document, and each piece whose predecessor is in the other split.

    Args:
        workers: processes that tokenize; None: one per core.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        UserError: ``out`` exists or is in use by another process, its unfinished directory is of another source or
            recipe, the disk is full, the source cannot be read, or there is too little text for both splits.
    """
    with unfinished(out) as directory:
        preparation = _Preparation(source, directory, recipe or Recipe())
        result = preparation.run(workers or host.usable_cores(), progress)
        if result is None:
            shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the open lock under another name
            raise UserError(preparation.why_too_little())
        publish(directory, out, *result)
    return open_dataset(out)


def is_prepared(out: Path) -> bool:
    """Return whether ``out`` is a complete dataset of ``prepare``."""
    return (out / INDEX).exists()


class _Preparation:
    """One preparation, continued from the recorded progress if there is any."""

    def __init__(self, source: Source, directory: Path, recipe: Recipe) -> None:
        self._source, self._directory, self._recipe = source, directory, recipe
        self._identity = identity_of(source, asdict(recipe))
        self._progress = read_progress(directory, self._identity)
        remaining = max(0.0, self._expected_tokens() - self._progress.tokens)
        check_free_space(directory, TOKEN_BYTES * remaining, f"{format_tokens(remaining)} tokens")
        self._writers: dict[Split, SplitWriter] = {
            split: SplitWriter(directory, split, recipe.shard_tokens, written)
            for split, written in self._progress.splits.items()
        }
        self._next_record = time.monotonic() + _RECORD_SECONDS

    def run(self, workers: int, progress: bool) -> tuple[list[Shard], str] | None:
        """Write all shards; return them and the index, or None if a split has no tokens."""
        try:
            with Encoder(workers) as encoder, self._bar(progress) as bar:
                pieces = pieces_of(self._source, self._progress.position)
                texts = ((piece.text, (piece, counts)) for piece, counts in pieces)
                for ((piece, counts), tokens), following in with_next(encoder.encode(texts)):
                    is_last = following is None or not following[0][0].text or self._would_fill(tokens)
                    bar.update(self._write_piece(piece, counts, tokens, is_last))
                    if self._is_full():
                        break
                    self._record_progress_if_due()
            self._record_separator()
            if self._source.separator is not None and not self._progress.separated:
                log.warning(_unused_separator(self._source.separator.text))
            shards = [shard for writer in self._writers.values() for shard in writer.close()]
        finally:
            for writer in self._writers.values():
                writer.abandon()
        if {shard.split for shard in shards} != {"train", "val"}:
            return None
        return shards, index_content(shards, self._source.name, self._progress.counts.to_dict())

    def why_too_little(self) -> str:
        """Return the error message for the case that ``run`` returned None."""
        progress, limit = self._progress, self._recipe.tokens
        held_out, trained = progress.splits["val"].total, progress.splits["train"].total
        if held_out and not trained:
            fewer = f" or --tokens {held_out} (which holds out fewer)" if limit != held_out and held_out > 1 else ""
            held = counted(held_out, "token")
            return f"too little text: all of it, {held}, is held out for validation; give more{fewer}"
        if limit is not None and trained >= limit:
            return (
                f"--tokens {limit} is too small: the first piece of text alone has more, so that nothing is left for"
                " validation; give larger --tokens"
            )
        return (
            f"too little text for training and validation: {counted(progress.counts.documents, 'document')}"
            f" with {counted(trained, 'token')}, but at least two pieces of text are needed; give more text"
        )

    def _write_piece(self, piece: Piece, counts: Counts, tokens: Tokens, is_last: bool) -> int:
        """Write one piece; return how many tokens were written."""
        progress, tokens_before = self._progress, self._progress.tokens
        progress.counts.accumulate(counts)
        progress.position = piece.next_position
        if not piece.text:
            return 0
        progress.pieces += 1
        held_out = progress.splits["val"].total
        split, limit = self._recipe.holdout.split_of(progress.pieces, is_last, held_out)
        if piece.starts_document or split != progress.previous:
            tokens = _after_end_of_text(tokens)
        self._write(split, tokens[:limit])
        progress.previous = split
        if limit is not None and len(tokens) > limit:
            progress.previous = "train" if split == "val" else "val"
            self._write(progress.previous, _after_end_of_text(tokens[limit:]))
        return progress.tokens - tokens_before

    def _write(self, split: Split, tokens: Tokens) -> None:
        if self._recipe.tokens is not None:
            tokens = tokens[: self._recipe.tokens - self._progress.tokens]
        self._writers[split].write(tokens)

    def _is_full(self) -> bool:
        return self._recipe.tokens is not None and self._progress.tokens >= self._recipe.tokens

    def _would_fill(self, tokens: Tokens) -> bool:
        """Return whether a piece, with an <|endoftext|>, reaches the limit of tokens."""
        return self._recipe.tokens is not None and self._progress.tokens + 1 + len(tokens) >= self._recipe.tokens

    def _record_progress_if_due(self) -> None:
        start = time.monotonic()
        if start < self._next_record:
            return
        self._record_separator()
        for writer in self._writers.values():
            writer.sync()
        files.sync_directory(self._directory)
        write_progress(self._directory, self._identity, self._progress)
        end = time.monotonic()
        self._next_record = end + max(_RECORD_SECONDS, 20 * (end - start))

    def _record_separator(self) -> None:
        self._progress.separated |= self._source.separator is not None and self._source.separator.found

    def _expected_tokens(self) -> float:
        """Return an estimate of the tokens of the finished dataset."""
        return min(self._source.tokens, self._recipe.tokens or self._source.tokens)

    def _bar(self, progress: bool) -> tqdm[Any]:
        silent = not (progress and sys.stderr.isatty())
        return tqdm(
            desc="tokenizing",
            unit="tok",
            unit_scale=True,
            disable=silent,
            initial=self._progress.tokens,
            total=round(self._expected_tokens()) or None,
        )


def _unused_separator(separator: str) -> str:
    """Return the warning that a separator does not occur."""
    hint = ""
    if "\\" in separator:
        hint = "; backslashes are not interpreted: in bash, $'\\n' is a line end"
    return f"--separator {separator!r} does not occur in the text: nothing was split{hint}"


def _after_end_of_text(tokens: Tokens) -> Tokens:
    return np.concatenate((np.array([tokenizer.END_OF_TEXT], np.uint16), tokens))
