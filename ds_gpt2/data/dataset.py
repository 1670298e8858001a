"""A directory of shards as one list of windows per split."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ds_gpt2.data.reader import ShardReader
from ds_gpt2.data.shards import SUFFIXES, count_tokens
from ds_gpt2.errors import UserError

log = logging.getLogger(__name__)

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

_NAMED = ("fineweb-edu", "fineweb", "openwebtext", "sample")  # data sets that `prepare` makes by their names

INDEX = "dataset.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One entry of ``dataset.json``."""

    file: str
    split: Split
    tokens: int
    bytes: int
    sha256: str | None  # None for a foreign directory, which has no index


@dataclass(frozen=True)
class Dataset:
    """What a dataset directory holds."""

    dir: Path
    shards: tuple[Shard, ...]
    source: str
    counts: dict[str, int] = field(default_factory=dict)  # of documents, where that is known

    def split(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.split(split))

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a shard is added, removed, reordered or resized, or its recorded hash changes."""
        content = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_dataset(directory: Path) -> Dataset:
    """As ``read_dataset``, every shard's size checked.

    Raises:
        UserError: also where a shard is missing or cut.
    """
    dataset = read_dataset(directory)
    try:
        for shard in dataset.shards:
            _check_size(directory / shard.file, shard)
    except OSError as error:
        raise _unreadable(directory, error) from None
    return dataset


def read_dataset(directory: Path) -> Dataset:
    """Read ``dataset.json``, or index a foreign directory by its file names.

    Raises:
        UserError: no directory, no shards, another tokenizer or format.
    """
    if not directory.is_dir():
        raise UserError(f"no data: {directory} does not exist: {_how_to_prepare(directory)}, or set data.dir")
    index = directory / INDEX
    try:
        return _read_index(directory, index) if index.exists() else _read_foreign(directory)
    except OSError as error:
        raise _unreadable(directory, error) from None


def _how_to_prepare(directory: Path) -> str:
    """The command that makes the data set that ``directory`` is named after."""
    if directory.name in _NAMED:
        return f"make it with `./launch.sh prepare {directory.name} --out {directory}`"
    return f"make it from your text with `./launch.sh prepare text FILE... --out {directory}`"


def index_of(shards: list[Shard], source: str, counts: dict[str, int]) -> str:
    """The content of ``dataset.json``.

    Args:
        counts: of documents, for people.
    """
    head = {"format": FORMAT, "tokenizer": "gpt2", "source": source, "counts": counts}
    return json.dumps({**head, "shards": [asdict(shard) for shard in shards]}, indent=1) + "\n"


def count_windows_of(dataset: Dataset, split: Split, sequence_length: int) -> int:
    """The windows of a split.

    Raises:
        UserError: no shard of this split is as long as one window.
    """
    counts = _windows_of_shards(dataset, split, sequence_length)
    if not sum(counts):
        raise UserError(
            f"{dataset.dir} has {dataset.tokens(split)} {split} tokens in {len(counts)} shard(s), too few for one"
            f" window of {sequence_length} + 1: prepare more text or set a smaller batch.sequence_length"
        )
    return sum(counts)


def _windows_of_shards(dataset: Dataset, split: Split, sequence_length: int) -> list[int]:
    return [max(0, shard.tokens - 1) // sequence_length for shard in dataset.split(split)]


class Windows:
    """The windows of one split: ``sequence_length + 1`` consecutive tokens of a shard, one token shared by neighbours.

    A shard's tail shorter than a window is not used.
    """

    def __init__(
        self, dataset: Dataset, split: Split, sequence_length: int, tell: Callable[[str], None] = log.warning
    ) -> None:
        """
        Args:
            tell: is given what goes wrong when shards are read, one line each.

        Raises:
            UserError: no shard of this split is as long as one window.
        """
        self.sequence_length = sequence_length
        self._reader = ShardReader([dataset.dir / shard.file for shard in dataset.split(split)], tell)
        count_windows_of(dataset, split, sequence_length)
        self._ends = np.cumsum(_windows_of_shards(dataset, split, sequence_length), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens (len(indices), sequence_length + 1) of the windows at ``indices``.

        Raises:
            UserError: see ``ShardReader.read``.
        """
        rows = np.empty((len(indices), self.sequence_length + 1), np.uint16)
        numbers = np.searchsorted(self._ends, indices, side="right")
        for row, number, index in zip(rows, numbers.tolist(), indices.tolist(), strict=True):
            first = int(self._ends[number - 1]) if number else 0
            self._reader.read(number, (index - first) * self.sequence_length, row)
        return rows.astype(np.int64)


def _read_index(directory: Path, index: Path) -> Dataset:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = tuple(Shard(**{key: entry[key] for key in Shard.__annotations__}) for entry in content["shards"])
        version, tokenizer, source = content["format"], content["tokenizer"], content["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a dataset index of ds_gpt2 ({error!r}): prepare the data again") from None
    if version != FORMAT or tokenizer != "gpt2":
        raise UserError(f"{index}: format {version}, tokenizer {tokenizer!r}; this version reads {FORMAT}, 'gpt2'")
    return Dataset(directory, shards, str(source), dict(content.get("counts", {})))


def _unreadable(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory} cannot be read: {error}")


def _check_size(path: Path, shard: Shard) -> None:
    if not path.exists():
        raise UserError(f"shard {path} is missing: restore it or prepare the data again")
    size = path.stat().st_size
    if size != shard.bytes or count_tokens(path) != shard.tokens:
        raise UserError(f"shard {path} has {size} bytes but {INDEX} says {shard.bytes}: it is cut or was replaced")


def _read_foreign(directory: Path) -> Dataset:
    paths = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    if not paths:
        raise UserError(f"no data: {directory} holds neither {INDEX} nor .bin or .npy shards")
    shards = tuple(
        Shard(path.name, split_of(path), count_tokens(path), path.stat().st_size, sha256=None) for path in paths
    )
    return Dataset(directory, shards, "shards without an index")


def split_of(path: Path) -> Split:
    """By its name: llm.c and build-nanogpt name their shards ..._val_000000 and ..._train_000001."""
    return "val" if re.search(r"(^|[_-])val([_.-]|$)", path.name) else "train"
