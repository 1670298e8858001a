"""Read documents from one column of a parquet file, in batches of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.unpacking import missing_package

_MOST_ROWS, _BATCH_BYTES = 1000, 4_000_000  # of a batch
_BUFFER_BYTES = 1 << 20  # without it pyarrow reads a whole column of a row group before the first row


def parquet_documents(path: Path, column: str, skip: int = 0) -> Iterator[str | None]:
    """Yield the strings of one column from row ``skip`` on.

    Raises:
        UserError: the file is truncated or not parquet, or the column is missing or not text.
    """
    with _opened(path, column) as file:
        first, skip = _first_row_group(file, skip)
        for group in range(first, file.num_row_groups):
            batch_size = _batch_size(file.metadata.row_group(group))
            for batch in file.iter_batches(batch_size, row_groups=[group], columns=[column]):
                rows = batch.column(0)
                if skip < len(rows):
                    yield from _strings(rows, skip)
                skip = max(0, skip - len(rows))


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as dicts from the names of its columns to Python values.

    Raises:
        UserError: the file is truncated or not parquet.
    """
    with _opened(path, None) as file:
        for batch in file.iter_batches(_MOST_ROWS):
            yield from batch.to_pylist()


def check_parquet(path: Path, column: str) -> None:
    """Check the schema of a file.

    Raises:
        UserError: see ``parquet_documents``.
    """
    with _opened(path, column):
        pass


@contextlib.contextmanager
def _opened(path: Path, column: str | None) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            if column is not None:
                _check_column(path, file.schema_arrow, column)
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as parquet: {reason}") from None


def _check_column(path: Path, schema: Any, column: str) -> None:
    names = schema.names
    if column not in names:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)}: give --column")
    if names.count(column) > 1:
        raise UserError(f"{path} has {names.count(column)} columns {column!r}: rename them, or give another --column")
    dtype = schema.field(column).type
    if not _is_text(dtype):
        raise UserError(f"{path}: column {column!r} is of type {dtype}, not text: give --column")


def _is_text(dtype: Any) -> bool:
    """Return whether values of this type are strings, in any representation."""
    from pyarrow import types

    if types.is_dictionary(dtype):
        return _is_text(dtype.value_type)
    return types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype)


def _first_row_group(file: Any, skip: int) -> tuple[int, int]:
    """Return (the row group of row ``skip``, the number of its rows before that row)."""
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if skip < rows:
            return number, skip
        skip -= rows
    return file.num_row_groups, skip


def _batch_size(group: Any) -> int:
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))


def _strings(rows: Any, skip: int) -> list[str | None]:
    """Return the rows from ``skip`` on. Invalid UTF-8, which parquet files may contain, is replaced by U+FFFD."""
    import pyarrow

    rows = rows.slice(skip)
    if pyarrow.types.is_dictionary(rows.type):
        rows = rows.dictionary_decode()
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        raw = rows.cast(pyarrow.large_binary()).to_pylist()
        return [None if each is None else each.decode("utf-8", errors="replace") for each in raw]
