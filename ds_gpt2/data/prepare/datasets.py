"""Prepare the datasets that the command ``prepare`` offers: the sample, local text, datasets of the hub, HellaSwag."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.data import hellaswag
from ds_gpt2.data.dataset import UNFINISHED, Dataset, open_dataset
from ds_gpt2.data.prepare import formats, hub_datasets
from ds_gpt2.data.prepare.holdout import FirstTokens
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.hub_download import hub_source
from ds_gpt2.data.prepare.output import unfinished_directory
from ds_gpt2.data.prepare.pipeline import Recipe, is_prepared, prepare
from ds_gpt2.data.prepare.pretokenized import fetch_shards
from ds_gpt2.data.prepare.sources import Reading, local_source, python_source

log = logging.getLogger(__name__)

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"
HELLASWAG_DIR = PROJECT_DIR / "data" / "hellaswag"

_EARLIER = PROJECT_DIR / "data" / f"text{UNFINISHED}"  # the output for local text in earlier versions
_RESERVED = {"sample", "hellaswag", "fineweb", "fineweb-edu", "openwebtext", *hub_datasets.TOKENS}
_HELD_OUT, _HELD_OUT_SHARE = 100_000_000, 0.02  # of the hub's datasets: the smaller of a number of tokens and a share


@dataclass(frozen=True)
class Destination:
    """Where a dataset is written, and how much of it."""

    out: Path | None = None  # None: in data/, named after the source
    tokens: int | None = None  # at most; None: all
    workers: int | None = None  # processes; None: one per core

    def directory(self, name: str) -> Path:
        """Return the output directory of a dataset called ``name``, possibly with an owner, as on the hub."""
        return (self.out or PROJECT_DIR / "data" / name.rsplit("/", 1)[-1]).absolute()


def prepare_sample(out: Path = SAMPLE_DIR, workers: int | None = None) -> Dataset:
    """Return the sample dataset, text of the Python installation; it is prepared unless it exists.

    Raises:
        UserError: it cannot be written, or the existing dataset is damaged.
    """
    if is_prepared(out):
        return open_dataset(out)
    return prepare(python_source(), out.absolute(), workers=workers)


def prepare_text(files: Sequence[Path], reading: Reading, to: Destination) -> Dataset:
    """Prepare a dataset from local files or directories of files.

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    source = local_source(list(files), reading=reading)
    if to.out is None and _EARLIER.is_dir():
        log.warning(
            f"{_EARLIER} is from an earlier version: remove it, or continue with --out {_EARLIER.with_suffix('')}"
        )
    out = to.directory(_name_of(files))
    return prepare(source, out, Recipe(tokens=to.tokens), workers=to.workers)


def prepare_from_hub(repository: Repository, name: str, column: str, to: Destination) -> Dataset:
    """Prepare a dataset of the Hugging Face hub; its first tokens become the validation split.

    Args:
        name: default name of the output directory.
        column: the column with the text.

    Raises:
        UserError: the dataset does not exist or cannot be downloaded.
    """
    out = to.directory(name)
    source = hub_source(repository, column, unfinished_directory(out) / "fetched")
    expected = min(source.tokens, to.tokens or source.tokens)
    held_out = FirstTokens(min(_HELD_OUT, max(1, round(_HELD_OUT_SHARE * expected))))
    return prepare(source, out, Recipe(held_out, tokens=to.tokens), workers=to.workers)


def download_shards(name: str, to: Destination) -> Dataset:
    """Download published token shards: a known dataset, or a repository of the hub.

    Raises:
        UserError: they do not exist or cannot be downloaded.
    """
    return fetch_shards(hub_datasets.TOKENS.get(name, Repository(name)), to.directory(name), to.tokens)


@dataclass(frozen=True)
class HellaswagFile:
    path: Path
    items: int
    is_original: bool  # identical to the original file


def prepare_hellaswag(out: Path, source: Path | None) -> HellaswagFile:
    """Write HellaSwag's validation file into ``out`` unless it exists.

    Args:
        source: a local file to copy; None: download.

    Raises:
        UserError: the file cannot be read or downloaded.
    """
    path = out / hellaswag.FILE
    if source is not None:
        hellaswag.copy(source, path)
    elif not hellaswag.is_original(path):
        hellaswag.fetch(path, hellaswag.URL, hellaswag.SHA256)
    items = sum(1 for _ in hellaswag.read_questions(path))
    return HellaswagFile(path, items, hellaswag.is_original(path))


def _name_of(files: Sequence[Path]) -> str:
    """Return the default name of a dataset, from the first of its files."""
    first = files[0].resolve() if files[0].name in ("", "..") else files[0]
    name = re.sub(r"\s+", "-", first.name if files[0].is_dir() else formats.stem_of(first.name)).strip(".-")
    name = name.removesuffix(UNFINISHED) or "text"
    if len(files) > 1:
        name += f"-and-{len(files) - 1}-more"
    return f"{name}-text" if name in _RESERVED else name
