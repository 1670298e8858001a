"""Parquet files to documents: one column, some rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.unpacking import needs

_MOST_ROWS, _BATCH_BYTES = 1000, 4_000_000  # at once
_BUFFER_BYTES = 1 << 20  # pyarrow would else read a whole column before its first row


def parquet_documents(path: Path, column: str, skip: int = 0) -> Iterator[str | None]:
    """Return the strings of one column from row ``skip`` on.

    Raises:
        UserError: it is cut or no parquet file, has no such column, or one that is not text.
    """
    with _opened(path, column) as file:
        first, skip = _first_row_group(file, skip)
        for group in range(first, file.num_row_groups):
            rows_at_once = _rows_at_once(file.metadata.row_group(group))
            for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=[column]):
                rows = batch.column(0)
                if skip < len(rows):
                    yield from _strings(rows, skip)
                skip = max(0, skip - len(rows))


def check_parquet(path: Path, column: str) -> None:
    """Look at the file's schema.

    Raises:
        UserError: see ``parquet_documents``.
    """
    with _opened(path, column):
        pass


@contextlib.contextmanager
def _opened(path: Path, column: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise needs(path, "pyarrow") from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            _check_column(path, file.schema_arrow, column)
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as parquet: {reason}") from None


def _check_column(path: Path, schema: Any, column: str) -> None:
    names = schema.names
    if column not in names:
        raise UserError(f"{path} has no column {column!r} but {', '.join(names)}: give --column")
    if names.count(column) > 1:
        raise UserError(f"{path} has {names.count(column)} columns {column!r}: rename them, or give another --column")
    kind = schema.field(column).type
    if not _is_text(kind):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text: give --column")


def _is_text(kind: Any) -> bool:
    """Whether its values are strings, however they are stored."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


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
    """Parquet does not check that text is UTF-8; invalid bytes become U+FFFD."""
    import pyarrow

    rows = rows.slice(skip)
    if pyarrow.types.is_dictionary(rows.type):
        rows = rows.dictionary_decode()
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        raw = rows.cast(pyarrow.large_binary()).to_pylist()
        return [None if each is None else each.decode("utf-8", errors="replace") for each in raw]
