"""What is in a dataset: is every shard what it was, and what do its documents look like?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.host import usable_cores
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Dataset, Shard, Split
from ds_gpt2.data.shards import Tokens, open_shard, sha256

_BLOCK = 1 << 24  # tokens looked at together
_MOST_IN_A_DOCUMENT = 0.5  # share of <|endoftext|> above which a shard is no text


@dataclass(frozen=True)
class ShardReport:
    """One shard, all of it read."""

    file: str
    split: Split
    tokens: int
    end_of_text: int  # such tokens: documents, where each begins with one
    sha256: str | None  # None: it cannot be read
    problem: str | None


@dataclass(frozen=True)
class Lengths:
    """Documents of a split, in tokens."""

    documents: int
    mean: float
    median: float
    longest: int


def verify_shards(dataset: Dataset, tell: Callable[[ShardReport], object] = lambda report: None) -> list[ShardReport]:
    """Every shard against the index, and against each other; shards are read side by side, one a core.

    Args:
        tell: is given each shard when it has been read.
    """
    seen: dict[str, str] = {}
    reports = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for report in pool.map(lambda shard: read_shard(dataset.dir, shard), dataset.shards):
            if report.problem is None and report.sha256 in seen:
                twin = f"has the same content as {seen[report.sha256]}"
                report = ShardReport(**{**vars(report), "problem": twin})
            if report.sha256 is not None:
                seen.setdefault(report.sha256, report.file)
            tell(report)
            reports.append(report)
    return reports


def lengths(dataset: Dataset, split: Split) -> Lengths:
    """Of whole documents and of stretches that were cut off by the ends of shards."""
    counts = [_document_lengths(open_shard(dataset.dir / shard.file)) for shard in dataset.split(split)]
    every = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    if not len(every):
        return Lengths(0, 0.0, 0.0, 0)
    return Lengths(len(every), float(every.mean()), float(np.median(every)), int(every.max()))


def examples(dataset: Dataset, split: Split, count: int, tokens: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """Beginnings of documents at random places: shard, position and up to ``tokens`` tokens of it as text."""
    rng = random.Random(seed)
    shards = [shard for shard in dataset.split(split) if shard.tokens]
    for _ in range(count if shards else 0):
        (shard,) = rng.choices(shards, [each.tokens for each in shards])
        content = open_shard(dataset.dir / shard.file)
        place = rng.randrange(len(content))
        start = _next_document(content, place)
        end = _next_document(content, start + 1) if start + 1 < len(content) else len(content)
        end = min(end if end > start else len(content), start + 1 + tokens)
        yield shard.file, start, _text(dataset.dir / shard.file, content[start:end]).removeprefix("<|endoftext|>")


def read_shard(directory: Path, shard: Shard) -> ShardReport:
    """All of one shard, compared with its entry in the index."""
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
        return f"has {tokens:,} tokens, dataset.json says {shard.tokens:,}"
    if shard.sha256 is not None and digest != shard.sha256:
        return "is not what was written: its sha256 is not the one in dataset.json"
    if highest > tokenizer.END_OF_TEXT:
        return f"has token id {highest}, GPT-2's end at {tokenizer.END_OF_TEXT}: made with another tokenizer"
    if not tokens:
        return "is empty"
    if ends > _MOST_IN_A_DOCUMENT * tokens:
        return f"is no text: {ends:,} of its {tokens:,} tokens are <|endoftext|>"
    return None


def _document_lengths(content: Tokens) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Tokens between one <|endoftext|> and the next."""
    starts = np.flatnonzero(np.asarray(content) == tokenizer.END_OF_TEXT)
    edges = np.unique(np.concatenate(([0], starts, [len(content)])))
    return np.diff(edges).astype(np.int64)


def _text(path: Path, tokens: Tokens) -> str:
    if int(tokens.max()) > tokenizer.END_OF_TEXT:
        raise UserError(
            f"shard {path} has token id {int(tokens.max())}, GPT-2's end at {tokenizer.END_OF_TEXT}: made with another"
            " tokenizer, or damaged; `verify` reads all shards"
        )
    return tokenizer.gpt2().decode(tokens.tolist())


def _next_document(content: Tokens, place: int) -> int:
    """Where a document begins at ``place`` or after it; the shard's beginning where none does."""
    for start in range(place, len(content), _BLOCK):
        found = np.flatnonzero(content[start : start + _BLOCK] == tokenizer.END_OF_TEXT)
        if len(found):
            return start + int(found[0])
    return 0
