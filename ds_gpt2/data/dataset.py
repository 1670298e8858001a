"""Open a directory of shards, with an index or without, and read windows of its splits."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.formatting import counted
from ds_gpt2.data.shard_reader import ShardReader
from ds_gpt2.data.shards import count_tokens, is_shard
from ds_gpt2.data.split_names import Split as Split
from ds_gpt2.data.split_names import split_of

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "val")

_NAMED = ("fineweb-edu", "fineweb", "openwebtext", "sample")  # datasets that `prepare` creates by name

INDEX = "dataset.json"
UNFINISHED = ".unfinished"  # suffix of a directory in preparation
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One entry of ``dataset.json``."""

    file: str
    split: Split
    tokens: int
    bytes: int
    sha256: str | None  # None without an index


@dataclass(frozen=True)
class Dataset:
    """The content of a dataset directory."""

    dir: Path
    shards: tuple[Shard, ...]
    source: str
    counts: dict[str, int] = field(default_factory=dict)  # of documents, if known
    left_out: tuple[str, ...] = ()  # names of the shards of a test split

    def split(self, split: Split) -> list[Shard]:
        """Return the shards of ``split``, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        """Return the number of tokens in ``split``."""
        return sum(shard.tokens for shard in self.split(split))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change if shards are added, removed, reordered or resized, or a recorded hash changes."""
        content = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_dataset(directory: Path) -> Dataset:
    """Return the dataset in ``directory`` after checking the size of every shard.

    Raises:
        UserError: as ``read_dataset``, or a shard is missing or truncated.
    """
    dataset = read_dataset(directory)
    try:
        for shard in dataset.shards:
            _check_size(directory / shard.file, shard)
    except OSError as error:
        raise _unreadable(directory, error) from None
    return dataset


def read_dataset(directory: Path, bad_shards: bool = False) -> Dataset:
    """Return the dataset in ``directory``, from ``dataset.json`` or, without one, from the file names.

    Args:
        bad_shards: without an index, include shards that cannot be opened, with 0 tokens.

    Raises:
        UserError: there is no directory or no shard, or the tokenizer or format is not supported.
    """
    index = directory / INDEX
    try:
        if not directory.is_dir():
            raise _missing(directory)
        if index.exists():
            return _read_index(directory, index)
        if (directory / UNFINISHED).is_dir():
            raise _unfinished(directory)
        return _read_without_index(directory, bad_shards)
    except OSError as error:
        raise _unreadable(directory, error) from None


def _how_to_prepare(directory: Path) -> str:
    """Return how to create the dataset that ``directory`` is named after."""
    out = shlex.quote(str(directory))
    if directory.name in _NAMED:
        return f"create it with `./launch.sh prepare {directory.name} --out {out}`"
    return f"create it from your text with `./launch.sh prepare text FILE... --out {out}`"


def index_content(shards: list[Shard], source: str, counts: dict[str, int]) -> str:
    """Return the content of ``dataset.json``.

    Args:
        source: where the text is from; displayed only.
        counts: of documents; displayed only.
    """
    head = {"format": FORMAT, "tokenizer": "gpt2", "source": source, "counts": counts}
    return json.dumps({**head, "shards": [asdict(shard) for shard in shards]}, indent=1) + "\n"


def count_windows_of(dataset: Dataset, split: Split, sequence_length: int) -> int:
    """Return the number of windows of a split.

    Raises:
        UserError: no shard of this split is as long as one window.
    """
    counts = _windows_per_shard(dataset, split, sequence_length)
    if not sum(counts):
        raise UserError(
            f"{dataset.dir} has {counted(dataset.tokens(split), f'{split} token')} in"
            f" {counted(len(counts), 'shard')}, too few for one window of {sequence_length} + 1: prepare more text or"
            " set a smaller batch.sequence_length"
        )
    return sum(counts)


def _windows_per_shard(dataset: Dataset, split: Split, sequence_length: int) -> list[int]:
    return [max(0, shard.tokens - 1) // sequence_length for shard in dataset.split(split)]


class Windows:
    """The windows of one split: ``sequence_length + 1`` consecutive tokens of a shard.

    Neighboring windows share one token. The end of a shard that is shorter than a window is not used. The windows of
    several datasets are numbered one dataset after the other.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        split: Split,
        sequence_length: int,
        warn: Callable[[str], None] = log.warning,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            warn: called with one line for each failed read of a shard.
            stopped: see ``ShardReader``.

        Raises:
            UserError: a dataset has no shard of this split that is as long as one window.
        """
        self.sequence_length = sequence_length
        datasets = [datasets] if isinstance(datasets, Dataset) else datasets
        paths = [dataset.dir / shard.file for dataset in datasets for shard in dataset.split(split)]
        self._reader = ShardReader(paths, warn, stopped)
        for dataset in datasets:
            count_windows_of(dataset, split, sequence_length)
        counts = [count for dataset in datasets for count in _windows_per_shard(dataset, split, sequence_length)]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of the windows at ``indices`` (n,), (n, sequence_length + 1) int64.

        Raises:
            UserError: see ``ShardReader.read``.
        """
        rows = np.empty((len(indices), self.sequence_length + 1), np.uint16)
        numbers = np.searchsorted(self._ends, indices, side="right")
        for row, number, index in zip(rows, numbers.tolist(), indices.tolist(), strict=True):
            first = int(self._ends[number - 1]) if number else 0
            self._reader.read(number, (index - first) * self.sequence_length, row)
        return rows.astype(np.int64)


def _missing(directory: Path) -> UserError:
    if directory.with_name(directory.name + UNFINISHED).is_dir():
        return _unfinished(directory)
    if directory.exists():
        return UserError(f"{directory} is a file: data.dir is the directory with {INDEX} or the shards")
    fix = f"{_how_to_prepare(directory)}, or correct the path in the settings (data)"
    return UserError(f"no data: {directory} does not exist: {fix}")


def _unfinished(directory: Path) -> UserError:
    return UserError(f"{directory} is not finished: run its `prepare` command again to continue")


def _read_index(directory: Path, index: Path) -> Dataset:
    try:
        content = safe_json.read(index)
    except OSError as error:
        raise UserError(f"{index} cannot be read: {reason_of(error)}") from None
    except ValueError:
        raise _damaged_index(index, "not valid JSON") from None
    try:
        shards = tuple(_shard(entry) for entry in content["shards"])
        version, tokenizer, source = content["format"], content["tokenizer"], content["source"]
        counts = {str(name): int(count) for name, count in content.get("counts", {}).items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        wrong_value = isinstance(error, ValueError)
        reason = reason_of(error) if wrong_value else "a field is missing or has another type"
        raise _damaged_index(index, reason) from None
    if version != FORMAT or tokenizer != "gpt2":
        raise UserError(f"{index}: format {version}, tokenizer {tokenizer!r}; this version reads {FORMAT}, 'gpt2'")
    return Dataset(directory, shards, str(source), counts)


def _damaged_index(index: Path, reason: str) -> UserError:
    fix = "restore it from a copy, or prepare the data again"
    return UserError(f"{index} is not a dataset index of ds_gpt2 ({reason}): {fix}")


def _shard(entry: dict[str, Any]) -> Shard:
    """Return an entry of an index as a shard.

    Raises:
        ValueError, LookupError, TypeError: the entry is not valid.
    """
    shard = Shard(**{key: entry[key] for key in Shard.__annotations__})
    numbers, hashed = (shard.tokens, shard.bytes), shard.sha256
    if not isinstance(shard.file, str) or "\0" in shard.file or Path(shard.file).name != shard.file:
        raise ValueError(f"file {shard.file!r} is not a file name")
    if shard.split not in SPLITS or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"entry of {shard.file}")
    if hashed is not None and not isinstance(hashed, str):
        raise ValueError(f"sha256 of {shard.file}")
    return shard


def _unreadable(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory} cannot be read: {reason_of(error)}")


def _check_size(path: Path, shard: Shard) -> None:
    if not path.exists():
        raise UserError(f"shard {path} is missing: restore it or prepare the data again")
    size = path.stat().st_size
    if size != shard.bytes or count_tokens(path) != shard.tokens:
        raise UserError(
            f"shard {path} has {size} bytes but {INDEX} records {shard.bytes}: it was truncated or replaced; restore it"
            " or prepare the data again"
        )


def _read_without_index(directory: Path, bad_shards: bool) -> Dataset:
    paths = sorted(path for path in directory.iterdir() if is_shard(path.name))
    if not paths:
        raise UserError(f"no data: {directory} has neither {INDEX} nor .bin or .npy shards{_hint(directory)}")
    splits = {path: split_of(path) for path in paths}
    left_out = tuple(path.name for path, split in splits.items() if split is None)
    shards = tuple(
        Shard(path.name, split, _count_tokens(path, bad_shards), path.stat().st_size, sha256=None)
        for path, split in splits.items()
        if split is not None
    )
    source = "shards without an index"
    if left_out:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        source += f"; not used, a test split by their names: {some}"
        log.info(f"{directory}: left out {counted(len(left_out), 'shard')} of a test split, recognized by name: {some}")
    return Dataset(directory, shards, source, left_out=left_out)


def _count_tokens(path: Path, may_be_bad: bool) -> int:
    """Return the number of tokens in a shard; 0 if it cannot be opened and ``may_be_bad``."""
    try:
        return count_tokens(path)
    except UserError:
        if not may_be_bad:
            raise
        return 0


def as_first_read(dataset: Dataset, fingerprint: str) -> Dataset:
    """Return ``dataset``, or the dataset as version 0.1.0 split it if ``fingerprint`` is that of the old split.

    In a directory without an index, version 0.1.0 trained on every shard whose name lacks the word ``val``. A run
    that started with such a split keeps it, even if its training data include shards of a test split.

    Raises:
        UserError: a shard is missing, truncated or unreadable.
    """
    if fingerprint == dataset.fingerprint or (dataset.dir / INDEX).exists():
        return dataset
    paths = sorted(path for path in dataset.dir.iterdir() if path.suffix in (".bin", ".npy"))
    splits: list[Split] = ["val" if re.search(r"(^|[_-])val([_.-]|$)", path.name) else "train" for path in paths]
    shards = tuple(
        Shard(path.name, split, count_tokens(path), path.stat().st_size, sha256=None)
        for path, split in zip(paths, splits, strict=True)
    )
    original = Dataset(dataset.dir, shards, dataset.source)
    if original.fingerprint != fingerprint:
        return dataset
    log.warning(f"{dataset.dir}: the run keeps the split it started with, which differs from the names of the shards")
    return original


def _hint(directory: Path) -> str:
    """Return the end of an error message that names the subdirectories with shards."""
    found = [
        child.name
        for child in sorted(directory.iterdir())
        if child.is_dir() and any(is_shard(path.name) for path in child.iterdir())
    ]
    return f"; its subdirectories {', '.join(found)} have shards: give one of them" if found else ""
