"""Where documents come from: an ordered list of parts, files mostly, each of which can be read from any document on."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare import formats
from ds_gpt2.data.prepare.documents import BLOCK_CHARACTERS, COLUMN, Document
from ds_gpt2.data.prepare.files import FoundFile, find_files
from ds_gpt2.data.prepare.formats import Form, Format, format_of
from ds_gpt2.data.prepare.jsonl import check_jsonl, jsonl_documents
from ds_gpt2.data.prepare.parquet import check_parquet, parquet_documents
from ds_gpt2.data.prepare.separators import Separator, split_all
from ds_gpt2.data.prepare.unpacking import check_text, checked_blocks, checked_lines, named, open_text

log = logging.getLogger(__name__)

# Bytes of a file that make a token, about: English text, the same packed, and FineWeb-Edu's parquet files (its card's
# 10BT sample: 28.5 GB, 9.96 B tokens). Only to say how long it will take and how much disk.
_BYTES_PER_TOKEN = {"": 4.3, ".gz": 1.7, ".zst": 1.6, "parquet": 2.8}

_READER = "text 2"  # changes when the documents of a text file change, for preparations that are continued
_MOST_WARNINGS = 5


class SourcePart(Protocol):
    """A stretch of a source."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes, as it lies at its origin."""

    @property
    def mark(self) -> str:
        """Changes when its content does."""

    @property
    def reading(self) -> tuple[str, ...]:
        """How its documents are found in its content, where that can differ."""

    @property
    def tokens(self) -> float:
        """About how many it will make."""

    def documents(self, skip: int) -> Iterator[Document]:
        """From document ``skip`` on; what comes in blocks is read before the next is asked for.

        Raises:
            UserError: it cannot be read, or is not what it should be.
        """

    def prefetch(self) -> None:
        """It is the next one that will be read."""


@dataclass(frozen=True)
class Source:
    """What a dataset is made of."""

    name: str  # for people
    parts: Sequence[SourcePart]
    separator: Separator | None = None  # that splits documents

    @property
    def tokens(self) -> float:
        """About how many it will make."""
        return sum(part.tokens for part in self.parts)

    def identity(self) -> list[list[Any]]:
        """What must be the same when a preparation is continued."""
        return [[part.name, part.size, part.mark, *part.reading] for part in self.parts]


@dataclass(frozen=True)
class Reading:
    """How the user wants files to be read."""

    column: str = COLUMN
    separator: str | None = None  # splits a document into several
    encoding: str | None = None  # None: UTF-8, or what a byte order mark says
    form: Form | None = None  # of named files, whatever their endings


@dataclass(frozen=True)
class LocalFile:
    """A text file, which is one document; or one of JSON lines or a parquet file, whose column or field is given."""

    path: Path
    column: str = COLUMN
    separator: str | None = None
    encoding: str | None = None
    form: Form | None = None
    watch: Separator | None = field(default=None, compare=False)  # is informed when ``separator`` occurs

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self._status.st_size

    @property
    def mark(self) -> str:
        return str(self._status.st_mtime_ns)

    @property
    def reading(self) -> tuple[str, ...]:
        options = {"column": self.column, "separator": self.separator, "encoding": self.encoding, "form": self.form}
        defaults = {"column": COLUMN}
        given = [f"{name} {value}" for name, value in options.items() if value != defaults.get(name)]
        return (*given, *([] if self._format.form == "parquet" else [_READER]))

    @property
    def tokens(self) -> float:
        packing = "parquet" if self._format.form == "parquet" else self._format.packing
        return self.size / _BYTES_PER_TOKEN[packing]

    def documents(self, skip: int) -> Iterator[Document]:
        if self.separator is not None:
            yield from itertools.islice(
                split_all(self._documents(0), self.watch or Separator(self.separator)), skip, None
            )
        else:
            yield from self._documents(skip)

    def prefetch(self) -> None:
        """It is here."""

    def check(self) -> str | None:
        """Look at the beginning; returns a warning, if there is one to give.

        Raises:
            UserError: the file cannot be read, or is not what it should be.
        """
        form, packing = self._format.form, self._format.packing
        if form == "parquet":
            check_parquet(self.path, self.column)
            return None
        warning = check_text(self.path, packing, self.encoding)
        if form == "jsonl":
            with named(self.path), open_text(self.path, packing, self.encoding) as lines:
                check_jsonl(self.path, lines, self.column)
        return warning

    def _documents(self, skip: int) -> Iterator[Document]:
        if self._format.form == "parquet":
            yield from parquet_documents(self.path, self.column, skip)
        else:
            yield from itertools.islice(self._text_documents(), skip, None)

    def _text_documents(self) -> Iterator[Document]:
        with named(self.path), open_text(self.path, self._format.packing, self.encoding) as file:
            if self._format.form == "jsonl":
                yield from jsonl_documents(self.path, checked_lines(self.path, file, self.encoding), self.column)
            else:
                yield _whole_text(self.path, checked_blocks(self.path, file, self.encoding, BLOCK_CHARACTERS))

    @property
    def _format(self) -> Format:
        return format_of(self.path, self.form)

    @property
    def _status(self) -> os.stat_result:
        with named(self.path):
            return self.path.stat()


@dataclass(frozen=True)
class Listed:
    """Documents that a function gives, always the same ones."""

    name: str
    read: Callable[[], Iterable[Document]]
    size: int = 0
    mark: str = ""
    tokens: float = 0.0
    reading: tuple[str, ...] = ()

    def documents(self, skip: int) -> Iterator[Document]:
        return itertools.islice(self.read(), skip, None)

    def prefetch(self) -> None:
        """It is here."""


def local_source(paths: Iterable[Path], column: str = COLUMN, reading: Reading | None = None) -> Source:
    """Return files, and directories of them, as a source; each file is looked at.

    Args:
        column: the field or column with the text, where no ``reading`` is given.

    Raises:
        UserError: a path does not exist, a file is not what it should be, or nothing was found.
    """
    reading = reading or Reading(column)
    parts, warnings, left_out = [], [], 0
    separator = None if reading.separator is None else Separator(reading.separator)
    for found in find_files(paths):
        part = _part(found, reading, separator)
        try:
            warning = part.check()
        except UserError as error:
            if found.is_named or not formats.is_plain_json(found.path.name):
                raise
            left_out += 1  # a directory's .json may be anything
            if left_out <= _MOST_WARNINGS:
                log.warning(f"left out: {error}")
            continue
        parts.append(part)
        warnings += [warning] if warning else []
    if left_out > _MOST_WARNINGS:
        log.warning(f"and {left_out - _MOST_WARNINGS:,} more .json files left out")
    if reading.form is not None and not any(part.form for part in parts):
        log.warning(
            f"--format {reading.form} has no effect: it is for files that are named, not for those of directories"
        )
    for line in warnings[:_MOST_WARNINGS]:
        log.warning(line)
    if len(warnings) > _MOST_WARNINGS:
        log.warning(f"and {len(warnings) - _MOST_WARNINGS:,} more files with invalid characters")
    if not parts:
        raise UserError("no text found: all files were left out")
    more = f" and {len(parts) - 5} more" if len(parts) > 5 else ""
    return Source(", ".join(_printable(part.path.name) for part in parts[:5]) + more, parts, separator)


def python_source() -> Source:
    """Text that every Python installation has."""
    return Source("Python's manual and standard library", [Listed("python", python_documents, tokens=3_900_000)])


def python_documents() -> Iterator[str]:
    """The reference pages of Python's ``help()`` and the sources of its standard library, tests left out.

    Indentation is narrowed to one space a level: GPT-2 has no tokens for runs of spaces, and a small model would
    learn little else.
    """
    from pydoc_data import topics

    yield from topics.topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if not left_out.intersection(path.relative_to(library).parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            yield re.sub("^ +", lambda indent: " " * ((len(indent[0]) + 3) // 4), source, flags=re.MULTILINE)


def _part(found: FoundFile, reading: Reading, separator: Separator | None) -> LocalFile:
    form = reading.form if found.is_named else None
    part = LocalFile(found.path, reading.column, reading.separator, reading.encoding, form, separator)
    format_of(found.path, form)  # refuses what is not text
    return part


def _printable(name: str) -> str:
    """A file's name as valid Unicode; its bytes may be anything."""
    return name.encode(errors="backslashreplace").decode()


def _whole_text(path: Path, blocks: Iterator[str]) -> str | Iterable[str]:
    first = next(blocks, "")
    return first if len(first) < BLOCK_CHARACTERS else itertools.chain([first], _named_blocks(path, blocks))


def _named_blocks(path: Path, blocks: Iterator[str]) -> Iterator[str]:
    with named(path):
        yield from blocks
