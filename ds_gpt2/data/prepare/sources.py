"""Sources of documents: an ordered list of parts, mostly files, each readable from any document on."""

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
from ds_gpt2.data.prepare.decoding import check_text, checked_blocks, checked_lines, open_text
from ds_gpt2.data.prepare.documents import BLOCK_CHARACTERS, COLUMN, Document
from ds_gpt2.data.prepare.files import FoundFile, find_files
from ds_gpt2.data.prepare.formats import Form, Format, format_of
from ds_gpt2.data.prepare.jsonl import check_jsonl, jsonl_documents
from ds_gpt2.data.prepare.parquet import check_parquet, parquet_documents
from ds_gpt2.data.prepare.separators import Separator, split_all
from ds_gpt2.data.prepare.unpacking import naming_errors

log = logging.getLogger(__name__)

# Approximate bytes of a file per token, for estimates of time and disk space: English text, compressed text, and
# FineWeb-Edu's parquet files (10BT sample: 28.5 GB, 9.96 B tokens by its card).
_BYTES_PER_TOKEN = {"": 4.3, ".gz": 1.7, ".zst": 1.6, "parquet": 2.8}

_READER = "text 2"  # to be changed with the documents of text files, so that no preparation mixes two readers
_MOST_WARNINGS = 5


class SourcePart(Protocol):
    """A part of a source, such as a file."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Size in bytes where it is stored."""

    @property
    def mark(self) -> str:
        """Identifies the content: it changes with it."""

    @property
    def reading(self) -> tuple[str, ...]:
        """Options that determine the documents found in the content."""

    @property
    def tokens(self) -> float:
        """Estimated number of tokens."""

    def documents(self, skip: int) -> Iterator[Document]:
        """Yield the documents from number ``skip`` on. The blocks of a document must be read before the next one.

        Raises:
            UserError: it cannot be read, or has another format or encoding.
        """

    def prefetch(self) -> None:
        """Prepare to be read next."""


@dataclass(frozen=True)
class Source:
    """The text of a dataset."""

    name: str  # for display
    parts: Sequence[SourcePart]
    separator: Separator | None = None  # splits the documents of all parts

    @property
    def tokens(self) -> float:
        """Estimated number of tokens."""
        return sum(part.tokens for part in self.parts)

    def identity(self) -> list[list[Any]]:
        """Return what must be equal for a preparation to continue."""
        return [[part.name, part.size, part.mark, *part.reading] for part in self.parts]


@dataclass(frozen=True)
class Reading:
    """Options for reading files."""

    column: str = COLUMN  # column or field with the text
    separator: str | None = None  # splits a document into several
    encoding: str | None = None  # None: that of the byte order mark, or UTF-8
    form: Form | None = None  # format of files given by the user; None: by the suffix


@dataclass(frozen=True)
class LocalFile:
    """A text file, which is one document, or a file of JSON lines or parquet, with one document per line or row."""

    path: Path
    column: str = COLUMN
    separator: str | None = None
    encoding: str | None = None
    form: Form | None = None
    # Shared by all files of a source; records whether ``separator`` occurs.
    watch: Separator | None = field(default=None, compare=False)

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
        changed = [f"{name} {value}" for name, value in options.items() if value != defaults.get(name)]
        return (*changed, *([] if self._format.form == "parquet" else [_READER]))

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
        """Do nothing: the file is local."""

    def check(self) -> str | None:
        """Check the beginning of the file; return a warning or None.

        Raises:
            UserError: the file cannot be read, or has another format or encoding.
        """
        form, packing = self._format.form, self._format.packing
        if form == "parquet":
            check_parquet(self.path, self.column)
            return None
        warning = check_text(self.path, packing, self.encoding)
        if form == "jsonl":
            with naming_errors(self.path), open_text(self.path, packing, self.encoding) as lines:
                check_jsonl(self.path, lines, self.column)
        return warning

    def _documents(self, skip: int) -> Iterator[Document]:
        if self._format.form == "parquet":
            yield from parquet_documents(self.path, self.column, skip)
        else:
            yield from itertools.islice(self._text_documents(), skip, None)

    def _text_documents(self) -> Iterator[Document]:
        with naming_errors(self.path), open_text(self.path, self._format.packing, self.encoding) as file:
            if self._format.form == "jsonl":
                yield from jsonl_documents(self.path, checked_lines(self.path, file, self.encoding), self.column)
            else:
                yield _whole_text(self.path, checked_blocks(self.path, file, self.encoding, BLOCK_CHARACTERS))

    @property
    def _format(self) -> Format:
        return format_of(self.path, self.form)

    @property
    def _status(self) -> os.stat_result:
        with naming_errors(self.path):
            return self.path.stat()


@dataclass(frozen=True)
class Listed:
    """Documents returned by a function, the same in each call."""

    name: str
    read: Callable[[], Iterable[Document]]
    size: int = 0
    mark: str = ""
    tokens: float = 0.0
    reading: tuple[str, ...] = ()

    def documents(self, skip: int) -> Iterator[Document]:
        return itertools.islice(self.read(), skip, None)

    def prefetch(self) -> None:
        """Do nothing."""


def local_source(paths: Iterable[Path], column: str = COLUMN, reading: Reading | None = None) -> Source:
    """Return files, and directories of files, as a source, after checking the beginning of each file.

    Args:
        column: used if ``reading`` is None.

    Raises:
        UserError: a path does not exist, a file has another format or encoding, or no file was found.
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
            left_out += 1  # .json files of a directory may have any content
            if left_out <= _MOST_WARNINGS:
                log.warning(f"left out: {error}")
            continue
        parts.append(part)
        warnings += [warning] if warning else []
    if left_out > _MOST_WARNINGS:
        log.warning(f"and {left_out - _MOST_WARNINGS:,} more .json files left out")
    if reading.form is not None and not any(part.form for part in parts):
        log.warning(
            f"--format {reading.form} has no effect: it applies to files given by name, not to files of directories"
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
    """Return text that every Python installation has, as a source."""
    return Source("Python's manual and standard library", [Listed("python", python_documents, tokens=3_900_000)])


def python_documents() -> Iterator[str]:
    """Yield the reference pages of Python's ``help()`` and the sources of its standard library, without tests.

    Indentation is reduced to one space per level: GPT-2 has no tokens for runs of spaces, so a small model would learn
    little else.
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
    format_of(found.path, form)  # raises an error if it is not text
    return part


def _printable(name: str) -> str:
    """Return a file name, which may have any bytes, as valid Unicode."""
    return name.encode(errors="backslashreplace").decode()


def _whole_text(path: Path, blocks: Iterator[str]) -> str | Iterable[str]:
    first = next(blocks, "")
    return first if len(first) < BLOCK_CHARACTERS else itertools.chain([first], _later_blocks(path, blocks))


def _later_blocks(path: Path, blocks: Iterator[str]) -> Iterator[str]:
    with naming_errors(path):
        yield from blocks
