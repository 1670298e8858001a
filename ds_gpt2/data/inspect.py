"""Verify the shards of a dataset, measure its documents and show examples of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.host import usable_cores
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Dataset, Shard, Split
from ds_gpt2.data.shards import Tokens, open_shard, sha256

_BLOCK = 1 << 24  # tokens processed together
_MOST_END_OF_TEXT = 0.5  # share of <|endoftext|> tokens above which a shard is not text


@dataclass(frozen=True)
class ShardReport:
    """The result of reading a whole shard."""

    file: str
    split: Split
    tokens: int
    end_of_text: int  # number of <|endoftext|> tokens, which begin documents
    sha256: str | None  # None if the shard cannot be read
    problem: str | None  # None if the shard is good


@dataclass(frozen=True)
class Lengths:
    """Statistics of the documents of a split; lengths are in tokens."""

    documents: int
    mean: float
    median: float
    longest: int


def verify_shards(dataset: Dataset, on_read: Callable[[ShardReport], object] = lambda _: None) -> list[ShardReport]:
    """Compare every shard with the index and with the other shards, one thread per core.

    Args:
        on_read: called with the report of each shard when it has been read.

    Returns:
        one report per shard, in the order of the dataset.
    """
    file_by_hash: dict[str, str] = {}
    reports = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for report in pool.map(lambda shard: read_shard(dataset.dir, shard), dataset.shards):
            if report.problem is None and report.sha256 in file_by_hash:
                report = replace(report, problem=f"has the same content as {file_by_hash[report.sha256]}")
            if report.sha256 is not None:
                file_by_hash.setdefault(report.sha256, report.file)
            on_read(report)
            reports.append(report)
    return reports


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
        yield shard.file, start, _text(dataset.dir / shard.file, content[start:end]).removeprefix("<|endoftext|>")


def read_shard(directory: Path, shard: Shard) -> ShardReport:
    """Read a whole shard and compare it with its entry in the index. Errors become the report's ``problem``."""
    path = directory / shard.file
    try:
        content, digest = open_shard(path), sha256(path)
        blocks = [content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)]
        highest = max((int(block.max()) for block in blocks), default=0)
        ends = sum(int(np.count_nonzero(block == tokenizer.END_OF_TEXT)) for block in blocks)
    except UserError as error:
        return ShardReport(shard.file, shard.split, 0, 0, None, str(error))
    except OSError as error:
        return ShardReport(shard.file, shard.split, 0, 0, None, f"shard {path} cannot be read: {reason_of(error)}")
    return ShardReport(
        shard.file, shard.split, len(content), ends, digest, _problem(shard, len(content), digest, highest, ends)
    )


def _problem(shard: Shard, tokens: int, digest: str, highest: int, ends: int) -> str | None:
    if tokens != shard.tokens:
        return f"has {tokens:,} tokens, dataset.json records {shard.tokens:,}"
    if shard.sha256 is not None and digest != shard.sha256:
        return "has a checksum mismatch: its sha256 is not the one in dataset.json"
    if highest > tokenizer.END_OF_TEXT:
        return f"has token id {highest}, GPT-2's highest is {tokenizer.END_OF_TEXT}: not encoded by GPT-2's tokenizer"
    if not tokens:
        return "is empty"
    if ends > _MOST_END_OF_TEXT * tokens:
        return f"is not text: {ends:,} of its {tokens:,} tokens are <|endoftext|>"
    return None


def _document_lengths(content: Tokens) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the numbers of tokens from each <|endoftext|> to the next, (documents,) int64."""
    starts = np.flatnonzero(np.asarray(content) == tokenizer.END_OF_TEXT)
    edges = np.unique(np.concatenate(([0], starts, [len(content)])))
    return np.diff(edges).astype(np.int64)


def _text(path: Path, tokens: Tokens) -> str:
    if int(tokens.max()) > tokenizer.END_OF_TEXT:
        raise UserError(
            f"shard {path} has token id {int(tokens.max())}, GPT-2's highest is {tokenizer.END_OF_TEXT}: encoded by"
            " another tokenizer, or damaged; `verify` checks all shards"
        )
    return tokenizer.gpt2().decode(tokens.tolist())


def _next_document(content: Tokens, position: int) -> int:
    """Return the position of the first <|endoftext|> at or after ``position``; 0 if there is none."""
    for start in range(position, len(content), _BLOCK):
        found = np.flatnonzero(content[start : start + _BLOCK] == tokenizer.END_OF_TEXT)
        if len(found):
            return start + int(found[0])
    return 0
