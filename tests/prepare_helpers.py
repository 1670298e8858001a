"""Helpers of the tests of ``data.prepare``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.prepare.documents import Document, Unreadable
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Reading, Source, local_source
from ds_gpt2.data.shards import open_shard

END = tokenizer.END_OF_TEXT


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def listed(*parts: Iterable[str | None]) -> Source:
    contents = [list(part) for part in parts]
    return Source("test", [Listed(str(number), content.copy) for number, content in enumerate(contents)])


def prepared(documents: Iterable[str | None], out: Path, recipe: Recipe | None = None, workers: int = 1) -> Path:
    return prepare(listed(documents), out, recipe, workers=workers).dir


def tokens_of(directory: Path, split: str) -> list[int]:
    dataset = open_dataset(directory)
    shards = [open_shard(dataset.dir / shard.file) for shard in dataset.shards if shard.split == split]
    return np.concatenate(shards).tolist()


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class InterruptError(Exception):
    """Interrupts a preparation."""


def interrupting(source: Source, after: int) -> Source:
    """Return the same documents, with an exception after a number of them."""
    remaining = itertools.count(after, -1)

    def read(part: Any) -> Iterator[str | None]:
        for document in part.documents(0):
            if next(remaining) <= 0:
                raise InterruptError
            yield document

    return Source(source.name, [Listed(part.name, functools.partial(read, part)) for part in source.parts])


def read(path: Path, **options: Any) -> list[Document]:
    """Return all documents of one file as ``prepare text`` reads them; blocks are joined."""
    (part,) = local_source([path], reading=Reading(**options)).parts
    return [
        document if document is None or isinstance(document, str | Unreadable) else "".join(document)
        for document in part.documents(0)
    ]
