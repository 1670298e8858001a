"""Download, verify and index token shards that others have published."""

from __future__ import annotations

import itertools
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import sha256
from ds_gpt2.common.formatting import counted
from ds_gpt2.data.dataset import Dataset, Shard, index_content, open_dataset
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.hub_download import HubFile, fetch, list_files, source_name
from ds_gpt2.data.prepare.output import check_free_space, publish, unfinished
from ds_gpt2.data.shards import HEADER_BYTES, TOKEN_BYTES, count_tokens
from ds_gpt2.data.split_names import split_of
from ds_gpt2.data.verify import verify_shard

log = logging.getLogger(__name__)


def fetch_shards(repository: Repository, out: Path, tokens: int | None) -> Dataset:
    """Download all validation shards, and training shards in the order of their names until they have ``tokens``.

    Args:
        tokens: of training; None: all.

    Raises:
        UserError: ``out`` exists, the disk is full, or a shard cannot be downloaded or is not of GPT-2's tokens.
    """
    with unfinished(out) as directory:
        files = _chosen(list_files(repository, (".bin",)), repository, tokens)
        present = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        check_free_space(directory, sum(file.size for file in files) - present, "the shards")
        bar = tqdm(files, desc="downloading", unit="shard", disable=not sys.stderr.isatty())
        shards = [_checked(fetch(file, directory), directory, file) for file in bar]
        publish(directory, out, shards, index_content(shards, source_name(repository, files), {}))
    return open_dataset(out)


def _chosen(files: list[HubFile], repository: Repository, tokens: int | None) -> list[HubFile]:
    splits = [(file, split_of(Path(file.path))) for file in files]
    held_out = [file for file, split in splits if split == "val"]
    training = [file for file, split in splits if split == "train"]
    if not held_out or not training:
        raise UserError(f"{repository.name} has no .bin shards for both training and validation")
    if len({Path(file.path).name for file in (*held_out, *training)}) < len(held_out) + len(training):
        raise UserError(f"{repository.name} has shards of the same name in several directories")
    if test := [file.path for file, split in splits if split is None]:
        log.warning(f"{repository.name}: left out {counted(len(test), 'shard')} of a test split, recognized by name")
    ends = itertools.accumulate(map(_tokens_in, training))
    enough = next((number for number, end in enumerate(ends, start=1) if tokens and end >= tokens), len(training))
    return [*held_out, *training[:enough]]


def _tokens_in(file: HubFile) -> int:
    return (file.size - HEADER_BYTES) // TOKEN_BYTES


def _checked(path: Path, directory: Path, file: HubFile) -> Shard:
    """Move a downloaded shard to ``directory`` and return its entry for the index.

    Raises:
        UserError: it is not a shard, or not of GPT-2's tokens.
    """
    if path.parent != directory:
        path = path.rename(directory / path.name)
    split = split_of(path)
    assert split is not None  # see _chosen
    shard = Shard(path.name, split, count_tokens(path), file.size, file.sha256 or sha256(path))
    if (problem := verify_shard(directory, shard).problem) is not None:
        raise UserError(f"{file.path} of {file.repository} {problem}")
    return shard
