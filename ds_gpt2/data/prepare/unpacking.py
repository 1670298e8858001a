"""Open files that may be compressed with gzip or Zstandard, and describe errors of reading them."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import PROJECT_DIR

_LARGEST_WINDOW = 1 << 31  # bytes, the window of a Zstandard frame: that of zstd --long=31


def open_bytes(path: Path, packing: str) -> io.BufferedIOBase:
    """Open the uncompressed content of a file.

    Args:
        packing: "", ".gz" or ".zst".

    Raises:
        UserError: the library for this compression is not installed.
    """
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".zst":
        return _Unpacked(path)
    return path.open("rb")


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Turn an error of reading ``path`` into a UserError of one line that names it."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} cannot be read: {_gzip_problem(path, error)}") from None
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


def missing_package(path: Path, package: str) -> UserError:
    """Return the error for a file whose library is not installed."""
    return UserError(f"{path} needs {package}: `{sys.executable} -m pip install --editable '{PROJECT_DIR}[data]'`")


def _gzip_problem(path: Path, error: gzip.BadGzipFile) -> str:
    if not str(error).startswith("Not a gzipped file"):
        return f"it is damaged ({error}): download or copy it again"
    if _starts_with_gzip(path):
        return f"other data follows its gzip data; unpack it with `gunzip -c '{path}' > FILE` ({error})"
    return str(error)


def _starts_with_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


class _Unpacked(io.BufferedReader):
    """The content of a .zst file. Unlike the library's reader, it reports a truncated file."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_package(path, "zstandard") from None
        super().__init__(_Zstd(path, zstandard), 1 << 20)


class _Zstd(io.RawIOBase):
    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = path.open("rb")
        self._library, self._errors = zstandard, (zstandard.ZstdError, MemoryError)
        self._decompressor = self._new()
        self._buffer = b""  # uncompressed bytes that were not read yet
        self._is_frame_complete = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._buffer:
            packed = self._file.read(1 << 17)
            if not packed:
                if not self._is_frame_complete:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._buffer = self._unpack(packed)
        count = min(len(buffer), len(self._buffer))
        buffer[:count], self._buffer = self._buffer[:count], self._buffer[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _new(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        try:
            while packed:
                parts.append(self._decompressor.decompress(packed))
                packed = self._decompressor.unused_data
                self._is_frame_complete = self._decompressor.eof
                if self._is_frame_complete:  # more frames may follow
                    self._decompressor = self._new()
        except self._errors as error:
            raise OSError(str(error) or "not enough memory") from None
        return b"".join(parts)
