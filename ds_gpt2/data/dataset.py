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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.data.shard_reader import ShardReader
from ds_gpt2.data.shards import count_tokens, is_shard

log = logging.getLogger(__name__)

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

_NAMED = ("fineweb-edu", "fineweb", "openwebtext", "sample")  # data sets that `prepare` makes by their names

INDEX = "dataset.json"
UNFINISHED = ".unfinished"  # what ends the name of a directory that is being prepared
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
    left_out: tuple[str, ...] = ()  # shards of a test split

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


def read_dataset(directory: Path, bad_shards: bool = False) -> Dataset:
    """Read ``dataset.json``, or index a foreign directory by its file names.

    Args:
        bad_shards: accept shards of a foreign directory that cannot be opened, with 0 tokens.

    Raises:
        UserError: no directory, no shards, another tokenizer or format.
    """
    index = directory / INDEX
    try:
        if not directory.is_dir():
            raise _missing(directory)
        if index.exists():
            return _read_index(directory, index)
        if (directory / UNFINISHED).is_dir():
            raise UserError(f"{directory} is not finished: run the `prepare` command that makes it again")
        return _read_foreign(directory, bad_shards)
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
        self,
        dataset: Dataset,
        split: Split,
        sequence_length: int,
        tell: Callable[[str], None] = log.warning,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            tell: is given what goes wrong when shards are read, one line each.
            stopped: see ``ShardReader``.

        Raises:
            UserError: no shard of this split is as long as one window.
        """
        self.sequence_length = sequence_length
        self._reader = ShardReader([dataset.dir / shard.file for shard in dataset.split(split)], tell, stopped)
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


def _missing(directory: Path) -> UserError:
    if directory.with_name(directory.name + UNFINISHED).is_dir():
        return UserError(f"{directory} is not finished: run the `prepare` command that makes it again")
    if directory.exists():
        return UserError(f"{directory} is a file: data.dir is the directory with {INDEX} or the shards")
    return UserError(f"no data: {directory} does not exist: {_how_to_prepare(directory)}, or set data.dir")


def _read_index(directory: Path, index: Path) -> Dataset:
    try:
        content = safe_json.read(index)
    except OSError as error:
        raise UserError(f"{index} cannot be read: {reason_of(error)}") from None
    except ValueError as error:
        raise UserError(f"{index} is not a dataset index of ds_gpt2 ({error}): prepare the data again") from None
    try:
        shards = tuple(_shard(entry) for entry in content["shards"])
        version, tokenizer, source = content["format"], content["tokenizer"], content["source"]
        counts = {str(name): int(count) for name, count in content.get("counts", {}).items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(f"{index} is not a dataset index of ds_gpt2 ({reason}): prepare the data again") from None
    if version != FORMAT or tokenizer != "gpt2":
        raise UserError(f"{index}: format {version}, tokenizer {tokenizer!r}; this version reads {FORMAT}, 'gpt2'")
    return Dataset(directory, shards, str(source), counts)


def _shard(entry: dict[str, Any]) -> Shard:
    """
    Raises:
        ValueError, LookupError, TypeError: it is no entry of an index.
    """
    shard = Shard(**{key: entry[key] for key in Shard.__annotations__})
    numbers, hashed = (shard.tokens, shard.bytes), shard.sha256
    if not isinstance(shard.file, str) or "\0" in shard.file or Path(shard.file).name != shard.file:
        raise ValueError(f"file {shard.file!r} is not a name")
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
        raise UserError(f"shard {path} has {size} bytes but {INDEX} says {shard.bytes}: it is cut or was replaced")


def _read_foreign(directory: Path, bad_shards: bool) -> Dataset:
    paths = sorted(path for path in directory.iterdir() if is_shard(path.name))
    if not paths:
        raise UserError(f"no data: {directory} holds neither {INDEX} nor .bin or .npy shards{_below(directory)}")
    splits = {path: split_of(path) for path in paths}
    left_out = tuple(path.name for path, split in splits.items() if split is None)
    shards = tuple(
        Shard(path.name, split, _tokens_of(path, bad_shards), path.stat().st_size, sha256=None)
        for path, split in splits.items()
        if split is not None
    )
    source = "shards without an index"
    if left_out:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        source += f"; not used, by their names for testing: {some}"
        log.info(f"{directory}: {len(left_out)} shards are for testing by their names and are not used: {some}")
    return Dataset(directory, shards, source, left_out=left_out)


def _tokens_of(path: Path, may_be_bad: bool) -> int:
    try:
        return count_tokens(path)
    except UserError:
        if not may_be_bad:
            raise
        return 0


def as_first_read(dataset: Dataset, fingerprint: str) -> Dataset:
    """Return ``dataset``, or what version 0.1.0 read of it if that is what ``fingerprint`` stands for.

    That version took every shard of a directory without an index for training whose name did not have the word
    ``val``. A run that began with such a split keeps it, shards for testing among its training data included.
    """
    if fingerprint == dataset.fingerprint or (dataset.dir / INDEX).exists():
        return dataset
    paths = sorted(path for path in dataset.dir.iterdir() if path.suffix in (".bin", ".npy"))
    splits: list[Split] = ["val" if re.search(r"(^|[_-])val([_.-]|$)", path.name) else "train" for path in paths]
    shards = tuple(
        Shard(path.name, split, count_tokens(path), path.stat().st_size, sha256=None)
        for path, split in zip(paths, splits, strict=True)
    )
    before = Dataset(dataset.dir, shards, dataset.source)
    if before.fingerprint != fingerprint:
        return dataset
    log.warning(f"{dataset.dir}: the run keeps the split that it began with, although names of shards say otherwise")
    return before


def _below(directory: Path) -> str:
    """Where shards lie instead."""
    found = [
        child.name
        for child in sorted(directory.iterdir())
        if child.is_dir() and any(is_shard(path.name) for path in child.iterdir())
    ]
    return f"; its subdirectories {', '.join(found)} do: name one of them" if found else ""


# Words of names, as of ..._val_000000 (llm.c, build-nanogpt), validation-00000-of-00001 or Test.bin.
_TRAIN = {"train", "training", "trainset"}
_VAL = {
    "val",
    "valid",
    "validation",
    "valset",
    "dev",
    "devel",
    "development",
    "devset",
    "eval",
    "evaluate",
    "evaluation",
}
_VAL |= {"evalset", "heldout", "holdout"}
_TEST = {"test", "tests", "testing", "testset"}


def split_of(path: Path) -> Split | None:
    """Return the split of a shard by its name: the last word that names one; None for testing, training without any."""
    stem = re.sub(r"(held|hold)[^a-z]?out", r"\1out", path.name.lower().removesuffix(path.suffix.lower()))
    for word in reversed(re.findall(r"[a-z]+", stem)):
        if word in _TRAIN:
            return "train"
        if word in _VAL:
            return "val"
        if word in _TEST:
            return None
    return "train"
