"""Verify shards by reading them completely: checksums, token ids, duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.host import usable_cores
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Dataset, Shard, Split
from ds_gpt2.data.shards import TOKEN_BYTES, count_tokens, start_of, token_problem

_BLOCK_BYTES = 1 << 25
_MOST_END_OF_TEXT = 0.5  # share of <|endoftext|> tokens above which a shard is not text


@dataclass(frozen=True)
class ShardContent:
    """The result of reading a whole shard, without its entry in the index."""

    tokens: int
    end_of_text: int  # number of <|endoftext|> tokens, which begin documents
    sha256: str  # of the whole file
    problem: str | None  # a token id that GPT-2 does not have, with its position; None if there is none


@dataclass(frozen=True)
class ShardReport:
    """The result of comparing a shard with its entry in the index."""

    file: str
    split: Split
    tokens: int
    end_of_text: int  # number of <|endoftext|> tokens, which begin documents
    sha256: str | None  # None if the shard cannot be read
    problem: str | None  # None if the shard is good


def verify_shards(dataset: Dataset, on_read: Callable[[ShardReport], object] = lambda _: None) -> list[ShardReport]:
    """Compare every shard with the index and with the other shards, one thread per core.

    Args:
        on_read: called with the report of each shard when it has been read.

    Returns:
        One report per shard, in the order of the dataset.
    """
    file_by_hash: dict[str, str] = {}
    reports = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for report in pool.map(lambda shard: verify_shard(dataset.dir, shard), dataset.shards):
            if report.problem is None and report.sha256 in file_by_hash:
                report = replace(report, problem=f"has the same content as {file_by_hash[report.sha256]}")
            if report.sha256 is not None:
                file_by_hash.setdefault(report.sha256, report.file)
            on_read(report)
            reports.append(report)
    return reports


def verify_shard(directory: Path, shard: Shard) -> ShardReport:
    """Read a whole shard and compare it with its entry in the index. Errors become the report's ``problem``."""
    try:
        content = read_content(directory / shard.file)
    except UserError as error:
        return ShardReport(shard.file, shard.split, 0, 0, None, str(error))
    return ShardReport(
        shard.file, shard.split, content.tokens, content.end_of_text, content.sha256, _problem(shard, content)
    )


def read_content(path: Path) -> ShardContent:
    """Read a whole shard once.

    No memory map is used: an I/O error in one is a SIGBUS, which ends the process without an error message.

    Raises:
        UserError: the file is missing, truncated, unreadable or not a shard.
    """
    count, digest = count_tokens(path), hashlib.sha256()
    position, ends, problem = 0, 0, None
    try:
        start = start_of(path)
        with open(path, "rb", opener=regular_only) as file:
            digest.update(file.read(start))
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                tokens = np.frombuffer(block, "<u2", len(block) // TOKEN_BYTES)[: count - position]
                if problem is None and len(tokens):
                    index = int(tokens.argmax())
                    problem = token_problem(int(tokens[index]), position + index)
                ends += int(np.count_nonzero(tokens == tokenizer.END_OF_TEXT))
                position += len(tokens)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {reason_of(error)}") from None
    if position < count:
        raise UserError(f"shard {path} was truncated while it was read: restore it or prepare the data again")
    return ShardContent(count, ends, digest.hexdigest(), problem)


def _problem(shard: Shard, content: ShardContent) -> str | None:
    if content.tokens != shard.tokens:
        return f"has {content.tokens:,} tokens, dataset.json records {shard.tokens:,}"
    if shard.sha256 is not None and content.sha256 != shard.sha256:
        return "has a checksum mismatch: its sha256 is not the one in dataset.json"
    if content.problem is not None:
        return content.problem
    if not content.tokens:
        return "is empty"
    if content.end_of_text > _MOST_END_OF_TEXT * content.tokens:
        return f"is not text: {content.end_of_text:,} of its {content.tokens:,} tokens are <|endoftext|>"
    return None
