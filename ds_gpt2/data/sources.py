"""Where documents come from: an ordered list of parts, files mostly, each of which can be read from any document on."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ds_gpt2.config import PROJECT_DIR
from ds_gpt2.errors import UserError

TEXT, JSONL, PARQUET = (".txt", ".md", ".rst"), (".jsonl",), (".parquet",)
PACKED = ("", ".gz", ".zst")
ENDINGS = (*(kind + packed for kind in (*TEXT, *JSONL) for packed in PACKED), *PARQUET)
COLUMN = "text"

# Bytes of a file that make a token, about: English text, the same packed, and FineWeb-Edu's parquet files (its card's
# 10BT sample: 28.5 GB, 9.96 B tokens). Only to say how long it will take and how much disk.
_BYTES_PER_TOKEN = {"": 4.3, ".gz": 1.7, ".zst": 1.6, ".parquet": 2.8}

_MOST_ROWS, _BATCH_BYTES = 1000, 4_000_000  # of parquet at once
_BUFFER_BYTES = 1 << 20  # pyarrow would else read a whole column before its first row
_BLOCK_CHARACTERS = 1 << 20

Document = str | Iterable[str] | None  # whole; a long one in blocks; a null


class Part(Protocol):
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
    parts: Sequence[Part]

    @property
    def tokens(self) -> float:
        """About how many it will make."""
        return sum(part.tokens for part in self.parts)

    def identity(self) -> list[list[Any]]:
        """What must be the same when a preparation goes on."""
        return [[part.name, part.size, part.mark] for part in self.parts]


@dataclass(frozen=True)
class LocalFile:
    """A text file, which is one document; or one of JSON lines or a parquet file, whose column or field is given."""

    path: Path
    column: str = COLUMN

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def mark(self) -> str:
        return str(self.path.stat().st_mtime_ns)

    @property
    def tokens(self) -> float:
        return self.size / _BYTES_PER_TOKEN.get(self.path.suffix, _BYTES_PER_TOKEN[""])

    def documents(self, skip: int) -> Iterator[Document]:
        if self.path.suffix in PARQUET:
            yield from parquet_documents(self.path, self.column, skip)
        else:
            yield from itertools.islice(_text_documents(self.path, self.column), skip, None)

    def prefetch(self) -> None:
        """It is here."""


@dataclass(frozen=True)
class Listed:
    """Documents that a function gives, always the same ones."""

    name: str
    read: Callable[[], Iterable[Document]]
    size: int = 0
    mark: str = ""
    tokens: float = 0.0

    def documents(self, skip: int) -> Iterator[Document]:
        return itertools.islice(self.read(), skip, None)

    def prefetch(self) -> None:
        """It is here."""


def local_source(paths: Iterable[Path], column: str = COLUMN) -> Source:
    """Files and directories of them.

    Raises:
        UserError: a path that does not exist, or nothing found.
    """
    files = find_text_files(paths)
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return Source(", ".join(file.name for file in files[:5]) + more, [LocalFile(file, column) for file in files])


def python_source() -> Source:
    """Text that every Python installation has."""
    return Source("Python's manual and standard library", [Listed("python", python_documents, tokens=3_900_000)])


def find_text_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and below each directory every file with an ending known as text, sorted.

    Raises:
        UserError: a path that does not exist, or nothing found.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(child for child in path.rglob("*") if child.is_file() and child.name.endswith(ENDINGS))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no such text file or directory: {path}")
    if not files:
        raise UserError(f"no text found: directories are searched for {', '.join(ENDINGS)}")
    return files


def parquet_documents(path: Path, column: str, skip: int = 0) -> Iterator[str | None]:
    """The strings of one column, some rows at a time.

    Raises:
        UserError: it is cut or no parquet file, has no such column, or one that is not text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _needs(path, "pyarrow") from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path} has no column {column!r} but {', '.join(names)}: give --column")
            kind = file.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column {column!r} holds {kind}, not text: give --column")
            first, skip = _first_row_group(file, skip)
            for group in range(first, file.num_row_groups):
                rows_at_once = _rows_at_once(file.metadata.row_group(group))
                for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=[column]):
                    rows = batch.column(0)
                    if skip < len(rows):
                        yield from _strings(rows, skip)
                    skip = max(0, skip - len(rows))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


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


def _needs(path: Path, package: str) -> UserError:
    return UserError(f"{path} needs {package}: `{sys.executable} -m pip install --editable '{PROJECT_DIR}[data]'`")


def _first_row_group(file: Any, skip: int) -> tuple[int, int]:
    """(the row group in which row ``skip`` lies, rows of it before that)."""
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if skip < rows:
            return number, skip
        skip -= rows
    return file.num_row_groups, skip


def _rows_at_once(group: Any) -> int:
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))


def _strings(rows: Any, skip: int) -> list[str | None]:
    """Parquet does not check that text is UTF-8; what is not becomes U+FFFD."""
    rows = rows.slice(skip)
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        raw = rows.cast(pyarrow.binary()).to_pylist()
        return [None if each is None else each.decode("utf-8", errors="replace") for each in raw]


def _text_documents(path: Path, field: str) -> Iterator[Document]:
    """One document per text file, one per line of a .jsonl file.

    Bytes that are no UTF-8 become U+FFFD, as they do in web corpora.
    """
    with _named(path), _open_text(path) as file:
        yield from _jsonl_documents(path, file, field) if ".jsonl" in path.suffixes else [_whole_text(path, file)]


def _whole_text(path: Path, file: IO[str]) -> str | Iterable[str]:
    first = file.read(_BLOCK_CHARACTERS)
    return first if len(first) < _BLOCK_CHARACTERS else itertools.chain([first], _blocks(path, file))


def _blocks(path: Path, file: IO[str]) -> Iterator[str]:
    with _named(path):
        while block := file.read(_BLOCK_CHARACTERS):
            yield block


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of reading says of which file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    if path.suffix == ".zst":
        return io.TextIOWrapper(_Unpacked(path), encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


class _Unpacked(io.BufferedReader):
    """A .zst file's content; the library takes a cut file's end for an end, which this does not."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise _needs(path, "zstandard") from None
        super().__init__(_Zstd(path, zstandard), 1 << 20)


class _Zstd(io.RawIOBase):
    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = path.open("rb")
        self._library, self._errors = zstandard, zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor().decompressobj()
        self._left = b""
        self._ended = True  # whether a frame is complete

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._file.read(1 << 17)
            if not packed:
                if not self._ended:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._left = self._unpack(packed)
        taken = min(len(buffer), len(self._left))
        buffer[:taken], self._left = self._left[:taken], self._left[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self, packed: bytes) -> bytes:
        found = []
        try:
            while packed:
                found.append(self._unpacker.decompress(packed))
                packed = self._unpacker.unused_data
                self._ended = self._unpacker.eof
                if self._ended:  # more frames may follow
                    self._unpacker = self._library.ZstdDecompressor().decompressobj()
        except self._errors as error:
            raise OSError(str(error)) from None
        return b"".join(found)


def _jsonl_documents(path: Path, lines: Iterable[str], field: str) -> Iterator[str | None]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: not a JSON object with a string field "{field}"') from None
        if text is not None and not isinstance(text, str):
            raise UserError(f'{path}, line {number}: not a JSON object with a string field "{field}"')
        yield text
