"""Decode the content of files: detect the encoding, and refuse files that are not text.

The beginning of a file is checked before anything is written, the rest while it is read.
"""

from __future__ import annotations

import codecs
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.unpacking import naming_errors, open_bytes

_HEAD_BYTES = 1 << 18  # checked before anything is written
_MOST_CONTROL = 0.01  # share of control characters above which a file is not text
_MOST_INVALID = 0.002  # share of invalid characters above which a file has another encoding
_LEAST_INVALID = 5

# UTF-32 precedes UTF-16, because the little-endian mark of UTF-32 starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY_FORMATS = (  # initial bytes, and what to do
    (b"PK\x03\x04", "a zip archive (or an office document)"),
    (b"\x1f\x8b", "gzip data: rename it to end in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data: rename it to end in .zst"),
    (b"BZh91AY", "bzip2 data: unpack it"),
    (b"\xfd7zXZ\x00", "xz data: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (b"%PDF-", "a PDF document: save it as text"),
    (b"PAR1\x15", "parquet data: rename it to end in .parquet"),
    (b"\x93NUMPY", "a numpy array"),
    (b"SQLite format 3\0", "a SQLite database"),
)
# Python lists these as text encodings, but they encode host names or Python's literals.
_NOT_OF_TEXT = frozenset({"idna", "punycode", "undefined", "unicode-escape", "unicode_escape", "raw-unicode-escape"})
_NOT_OF_TEXT |= {"raw_unicode_escape"}
_REPLACE = "ds_gpt2.replace"  # name of the error handler below
_WINDOW = 1 << 20  # characters that are checked together after the beginning


def check_text(path: Path, packing: str, encoding: str | None) -> str | None:
    """Check the beginning of a file; return a warning or None.

    Args:
        packing: see ``open_bytes``.
        encoding: None: detected.

    Raises:
        UserError: the file cannot be read, is not text, or has another encoding.
    """
    _check_encoding(encoding or "utf-8")
    with naming_errors(path), open_bytes(path, packing) as file:
        head = _read(file, _HEAD_BYTES)
    for magic, what in _BINARY_FORMATS:
        if head.startswith(magic):
            raise UserError(f"{path} is not text but {what}")
    used = _encoding(head, encoding)
    _check_unicode(path, head, used, encoding)
    text = _decoded(head, used)
    control = count_control_characters(text)
    if control > _MOST_CONTROL * len(text):
        raise UserError(
            f"{path} is not text: {control:,} of its first {len(text):,} characters are control characters"
            " (binary data, or text that needs --encoding)"
        )
    # U+FFFD in the file itself is valid.
    invalid = text.count("\ufffd") - (head.count("\ufffd".encode()) if used.startswith("utf-8") else 0)
    return _check_invalid(path, invalid, len(text), used, given=encoding is not None)


def open_text(path: Path, packing: str, encoding: str | None) -> IO[str]:
    """Open a text file without its byte order mark; invalid bytes are replaced by U+FFFD.

    Raises:
        UserError: the library for its compression is not installed.
        OSError, EOFError, zlib.error: it cannot be read; see ``naming_errors``.
    """
    with open_bytes(path, packing) as file:
        used = _encoding(_read(file, 4), encoding)
    return io.TextIOWrapper(cast(IO[bytes], open_bytes(path, packing)), encoding=used, errors=_REPLACE)


def checked_lines(path: Path, file: IO[str], encoding: str | None) -> Iterator[str]:
    """Yield the lines of a file that ``open_text`` has opened.

    Raises:
        UserError: too many characters are not valid.
    """
    check = _Check(path, encoding)
    for line in file:
        check.add(line)
        yield line
    check.end()


def checked_blocks(path: Path, file: IO[str], encoding: str | None, characters: int) -> Iterator[str]:
    """Yield a file that ``open_text`` has opened, in blocks of ``characters``.

    Raises:
        UserError: too many characters are not valid, or are control characters.
    """
    check = _Check(path, encoding)
    while block := file.read(characters):
        check.add_block(block)
        yield block
    check.end()


class _Check:
    """Checks the text read from one file, a window of characters at a time."""

    def __init__(self, path: Path, encoding: str | None) -> None:
        self._path, self._encoding = path, encoding
        self._before = 0  # characters in earlier windows
        self._characters = 0
        self._replaced = _replaced.count

    def add(self, text: str) -> None:
        """Add text to the window; check the window if it is full. Raises as ``end``."""
        self._characters += len(text)
        if self._characters >= _WINDOW:
            self.end()

    def add_block(self, block: str) -> None:
        """Check a block as a window.

        Raises:
            UserError: too many of its characters are control characters, or as ``end``.
        """
        control = count_control_characters(block) if "\0" in block else 0  # binary data has NULs
        if control > _MOST_CONTROL * max(len(block), _HEAD_BYTES):
            where = f"characters {self._before + 1:,} to {self._before + len(block):,}"
            raise UserError(
                f"{self._path} is not text: {control:,} of {where} are control characters (binary data, or text that"
                " needs --encoding)"
            )
        self._characters += len(block)
        self.end()

    def end(self) -> None:
        """Check the window that ends here.

        Raises:
            UserError: too many of its characters are not valid in the detected encoding.
        """
        replaced = _replaced.count - self._replaced
        if self._encoding is None and replaced > _MOST_INVALID * max(self._characters, _HEAD_BYTES):
            where = f"characters {self._before + 1:,} to {self._before + self._characters:,}"
            raise UserError(
                f"{self._path}: {replaced:,} of {where} are not valid in the encoding of its beginning: give its"
                " --encoding (such as latin-1 or cp1252), or --encoding utf-8 to replace them by U+FFFD; remove the"
                " unfinished directory first, or give another --out DIR"
            )
        self._before += self._characters
        self._characters, self._replaced = 0, _replaced.count


class _Replaced(threading.local):
    """The number of invalid bytes or sequences that this thread has replaced, in all files."""

    count = 0


_replaced = _Replaced()


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Do as Python's error handler ``replace``, and count the replacements."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _replaced.count += 1
    return "\ufffd", error.end


codecs.register_error(_REPLACE, _replace)


def count_control_characters(text: str) -> int:
    """Return the number of ASCII control characters in ``text`` that are not used in text, such as NUL.

    Used in text are \\b, \\t, \\n, \\v, \\f, \\r, U+001A (end of file in DOS) and U+001B (terminals).
    """
    if not text:
        return 0
    # UTF-16 with numpy is several times as fast as UTF-8 or str.count.
    data, dtype = (text.encode(), "u1") if text.isascii() else (text.encode("utf-16-le", "surrogatepass"), "<u2")
    codes = np.frombuffer(data, dtype)
    found = np.count_nonzero(codes < 8) + np.count_nonzero(
        codes - codes.dtype.type(14) < 18
    )  # 14 to 31: others wrap around
    if found:
        found -= np.count_nonzero(codes == 26) + np.count_nonzero(codes == 27)
    return int(found) + (text.count("\x7f") if "\x7f" in text else 0)


def _check_encoding(encoding: str) -> None:
    """Check the name of an encoding.

    Raises:
        UserError: Python does not know it, or it is not a text encoding.
    """
    try:
        found = codecs.lookup(encoding)
        is_text = found._is_text_encoding and found.name not in _NOT_OF_TEXT
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        is_text = False
    if not is_text:
        raise UserError(f"unknown --encoding {encoding!r}: examples are utf-8, utf-16, latin-1 and cp1252")


def _check_unicode(path: Path, head: bytes, used: str, given: str | None) -> None:
    """Check a given UTF-16 or UTF-32 against the beginning of the file.

    Raises:
        UserError: the file is UTF-8, or has no byte order mark and the byte order is not given.
    """
    name = codecs.lookup(used).name
    is_marked = any(head.startswith(mark) for mark, _ in _MARKS)
    if given is None or is_marked or not head or not name.startswith(("utf-16", "utf-32")):
        return
    if b"\0" not in head and _is_utf8(head):
        raise UserError(f"{path} is UTF-8 or ASCII, not {name.upper()}: omit --encoding {given}")
    if name in ("utf-16", "utf-32"):
        raise UserError(
            f"{path} has no byte order mark, so --encoding {given} is ambiguous: give {name}-le or {name}-be"
        )


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _read(file: io.BufferedIOBase, count: int) -> bytes:
    """Return ``count`` bytes; fewer only at the end of the file."""
    content = b""
    while len(content) < count and (more := file.read(count - len(content))):
        content += more
    return content


def _encoding(head: bytes, given: str | None) -> str:
    """Return the encoding of the byte order mark, unless a non-Unicode one is given; else the given one or UTF-8."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if given is not None and not codecs.lookup(given).name.startswith("utf-"):
        return given
    return marked or given or "utf-8"


def _decoded(head: bytes, encoding: str) -> str:
    """Decode ``head`` without a last character that is incomplete."""
    return codecs.getincrementaldecoder(encoding)("replace").decode(head)


def _check_invalid(path: Path, invalid: int, characters: int, encoding: str, given: bool) -> str | None:
    """Return a warning about invalid characters, or None.

    Raises:
        UserError: there are too many, and the encoding was not given.
    """
    if invalid <= 0:
        return None
    problem = f"{path}: {invalid:,} of the first {characters:,} characters are not valid {encoding.upper()}"
    if not given and invalid >= _LEAST_INVALID and invalid > _MOST_INVALID * characters:
        raise UserError(
            f"{problem}: give its --encoding (such as latin-1 or cp1252), or --encoding utf-8 to replace them by U+FFFD"
        )
    return f"{problem} and are replaced by U+FFFD; if the file has another encoding, give --encoding"
