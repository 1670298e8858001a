"""Measure the documents of a dataset and show examples of them."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Dataset, Split
from ds_gpt2.data.shards import Tokens, open_shard, token_problem

_BLOCK = 1 << 24  # tokens processed together


@dataclass(frozen=True)
class Lengths:
    """Statistics of the documents of a split; lengths are in tokens."""

    documents: int
    mean: float
    median: float
    longest: int


def lengths(dataset: Dataset, split: Split) -> Lengths:
    """Return statistics of the documents of a split; the two parts of a document cut by a shard's end count separately.

    Raises:
        UserError: a shard cannot be read.
    """
    counts = [_document_lengths(open_shard(dataset.dir / shard.file)) for shard in dataset.split(split)]
    combined = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    if not len(combined):
        return Lengths(0, 0.0, 0.0, 0)
    return Lengths(len(combined), float(combined.mean()), float(np.median(combined)), int(combined.max()))


def examples(dataset: Dataset, split: Split, count: int, tokens: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """Yield the beginnings of ``count`` random documents: file, position of the first token, text of ``tokens`` tokens.

    Raises:
        UserError: a shard cannot be read, or has a token id outside GPT-2's vocabulary.
    """
    rng = random.Random(seed)
    shards = [shard for shard in dataset.split(split) if shard.tokens]
    for _ in range(count if shards else 0):
        (shard,) = rng.choices(shards, [each.tokens for each in shards])
        content = open_shard(dataset.dir / shard.file)
        start = _next_document(content, rng.randrange(len(content)))
        end = _next_document(content, start + 1) if start + 1 < len(content) else len(content)
        end = min(end if end > start else len(content), start + 1 + tokens)
        text = _text(dataset.dir / shard.file, content[start:end])
        yield shard.file, start, text.removeprefix(tokenizer.END_OF_TEXT_MARK)


def _document_lengths(content: Tokens) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the numbers of tokens from each <|endoftext|> to the next, (documents,) int64."""
    starts = np.flatnonzero(np.asarray(content) == tokenizer.END_OF_TEXT)
    edges = np.unique(np.concatenate(([0], starts, [len(content)])))
    return np.diff(edges).astype(np.int64)


def _text(path: Path, tokens: Tokens) -> str:
    if (problem := token_problem(int(tokens.max()))) is not None:
        raise UserError(
            f"shard {path} {problem}; `./launch.sh verify {shlex.quote(str(path.parent))}` checks all shards"
        )
    return tokenizer.gpt2().decode(tokens.tolist())


def _next_document(content: Tokens, position: int) -> int:
    """Return the position of the first <|endoftext|> at or after ``position``; 0 if there is none."""
    for start in range(position, len(content), _BLOCK):
        found = np.flatnonzero(content[start : start + _BLOCK] == tokenizer.END_OF_TEXT)
        if len(found):
            return start + int(found[0])
    return 0
