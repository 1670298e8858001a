"""The content of a file as text: unpacked, its encoding found, and refused if it is not text.

The beginning is checked before anything is written, the rest while it is read.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import PROJECT_DIR

_HEAD_BYTES = 1 << 18  # looked at before anything is written
_MOST_CONTROL = 0.01  # share of control characters above which a file is not text
_MOST_INVALID = 0.002  # share of invalid characters above which a file has another encoding
_LEAST_INVALID = 5
_LARGEST_WINDOW = 1 << 31  # bytes of a zstd frame's window: zstd --long=31

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = (
    (b"PK\x03\x04", "a zip archive (or a document of an office program)"),
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
# Python has these among its encodings of text, but they encode names, or Python's own literals.
_NO_ENCODINGS = frozenset({"idna", "punycode", "undefined", "unicode-escape", "unicode_escape", "raw-unicode-escape"})
_NO_ENCODINGS |= {"raw_unicode_escape"}
_REPLACE = "ds_gpt2.replace"  # the error handler below
_WINDOW = 1 << 20  # characters that are judged together behind the beginning


def check_text(path: Path, packing: str, encoding: str | None) -> str | None:
    """Look at the beginning of a file; returns a warning, if there is one to give.

    Raises:
        UserError: the file cannot be read, is not text, or has another encoding.
    """
    _check_encoding(encoding or "utf-8")
    with named(path), open_bytes(path, packing) as file:
        head = _read(file, _HEAD_BYTES)
    for magic, what in _BINARY:
        if head.startswith(magic):
            raise UserError(f"{path} is not text but {what}")
    used = _encoding(head, encoding)
    _check_unicode(path, head, used, encoding)
    text = _decoded(head, used)
    control = control_characters(text)
    if control > _MOST_CONTROL * len(text):
        raise UserError(
            f"{path} is not text: {control:,} of its first {len(text):,} characters are control characters"
            " (binary data, or an --encoding that is not given)"
        )
    # U+FFFD that stands in the file itself is valid.
    invalid = text.count("\ufffd") - (head.count("\ufffd".encode()) if used.startswith("utf-8") else 0)
    return _judge_invalid(path, invalid, len(text), used, given=encoding is not None)


def open_text(path: Path, packing: str, encoding: str | None) -> IO[str]:
    """Open a text file; invalid bytes become U+FFFD, and a byte order mark is no part of the text.

    Raises:
        OSError, EOFError, zlib.error: it cannot be read; see ``named``.
    """
    with open_bytes(path, packing) as file:
        used = _encoding(_read(file, 4), encoding)
    return io.TextIOWrapper(cast(IO[bytes], open_bytes(path, packing)), encoding=used, errors=_REPLACE)


def checked_lines(path: Path, file: IO[str], encoding: str | None) -> Iterator[str]:
    """Yield the lines of a file that ``open_text`` has opened.

    Raises:
        UserError: too many of the characters behind the beginning are not valid.
    """
    check = _Check(path, encoding)
    for line in file:
        check.add(line)
        yield line
    check.end()


def checked_blocks(path: Path, file: IO[str], encoding: str | None, characters: int) -> Iterator[str]:
    """Yield a file that ``open_text`` has opened in blocks.

    Raises:
        UserError: too many of the characters behind the beginning are not valid, or control characters.
    """
    check = _Check(path, encoding)
    while block := file.read(characters):
        check.add_block(block)
        yield block
    check.end()


class _Check:
    """Judge what is read of one file, a window of characters at a time."""

    def __init__(self, path: Path, encoding: str | None) -> None:
        self._path, self._given = path, encoding
        self._before = 0  # characters in earlier windows
        self._characters = 0
        self._replaced = _replaced.count

    def add(self, text: str) -> None:
        self._characters += len(text)
        if self._characters >= _WINDOW:
            self.end()

    def add_block(self, block: str) -> None:
        control = control_characters(block) if "\0" in block else 0  # binary data has some
        if control > _MOST_CONTROL * max(len(block), _HEAD_BYTES):
            where = f"characters {self._before + 1:,} to {self._before + len(block):,}"
            raise UserError(
                f"{self._path} is not text: {control:,} of {where} are control characters (binary data, or an"
                " --encoding that is not given)"
            )
        self._characters += len(block)
        self.end()

    def end(self) -> None:
        """Judge the window that ends here."""
        replaced = _replaced.count - self._replaced
        if self._given is None and replaced > _MOST_INVALID * max(self._characters, _HEAD_BYTES):
            where = f"characters {self._before + 1:,} to {self._before + self._characters:,}"
            raise UserError(
                f"{self._path}: {replaced:,} of {where} are not valid in the encoding of its beginning: give its"
                " --encoding (such as latin-1 or cp1252), or --encoding utf-8 to replace them by U+FFFD; remove what is"
                " unfinished first, or give another --out DIR"
            )
        self._before += self._characters
        self._characters, self._replaced = 0, _replaced.count


class _Replaced(threading.local):
    """How many invalid bytes or sequences this thread has replaced, in all files."""

    count = 0


_replaced = _Replaced()


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Do as Python's error handler ``replace``, and count."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _replaced.count += 1
    return "\ufffd", error.end


codecs.register_error(_REPLACE, _replace)


def control_characters(text: str) -> int:
    """Return how many of ASCII's control characters ``text`` has that do not occur in text, such as NUL.

    Those that do are \\b, \\t, \\n, \\v, \\f, \\r, U+001A (the end of a file of DOS) and U+001B (of terminals).
    """
    if not text:
        return 0
    # UTF-16 and numpy, because UTF-8 and str.count take several times as long.
    data, dtype = (text.encode(), "u1") if text.isascii() else (text.encode("utf-16-le", "surrogatepass"), "<u2")
    codes = np.frombuffer(data, dtype)
    found = np.count_nonzero(codes < 8) + np.count_nonzero(codes - codes.dtype.type(14) < 18)  # modulo: 14 to 31
    if found:
        found -= np.count_nonzero(codes == 26) + np.count_nonzero(codes == 27)
    return int(found) + (text.count("\x7f") if "\x7f" in text else 0)


def open_bytes(path: Path, packing: str) -> io.BufferedIOBase:
    """Open a file's content, unpacked.

    Raises:
        UserError: the library that unpacks it is not installed.
    """
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".zst":
        return _Unpacked(path)
    return path.open("rb")


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn an error of reading into one line that names the file."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} cannot be read: {_gzip_problem(path, error)}") from None
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


def _gzip_problem(path: Path, error: gzip.BadGzipFile) -> str:
    if not str(error).startswith("Not a gzipped file"):
        return f"it is damaged ({error}): download or copy it again"
    if _begins_with_gzip(path):
        return f"other data follows its gzip data, unpack it with `gunzip -c '{path}' > FILE` ({error})"
    return str(error)


def _begins_with_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def needs(path: Path, package: str) -> UserError:
    """Return the error for a file whose library is not installed."""
    return UserError(f"{path} needs {package}: `{sys.executable} -m pip install --editable '{PROJECT_DIR}[data]'`")


def _check_encoding(encoding: str) -> None:
    """
    Raises:
        UserError: Python does not know it, or it is not a text encoding.
    """
    try:
        found = codecs.lookup(encoding)
        is_text = found._is_text_encoding and found.name not in _NO_ENCODINGS
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        is_text = False
    if not is_text:
        raise UserError(f"unknown --encoding {encoding!r}: utf-8, utf-16, latin-1, cp1252 are some")


def _check_unicode(path: Path, head: bytes, used: str, given: str | None) -> None:
    """
    Raises:
        UserError: UTF-16 or UTF-32 is given, and the file has no byte order mark or is UTF-8.
    """
    name = codecs.lookup(used).name
    is_marked = any(head.startswith(mark) for mark, _ in _MARKS)
    if given is None or is_marked or not head or not name.startswith(("utf-16", "utf-32")):
        return
    if b"\0" not in head and _is_utf8(head):
        raise UserError(f"{path} is UTF-8 or ASCII, not {name.upper()}: leave --encoding {given} out")
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
    """Up to ``count`` bytes; fewer only at the end."""
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found


def _encoding(head: bytes, given: str | None) -> str:
    """What a byte order mark says, unless another kind of encoding is given; else the one given, or UTF-8."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if given is not None and not codecs.lookup(given).name.startswith("utf-"):
        return given
    return marked or given or "utf-8"


def _decoded(head: bytes, encoding: str) -> str:
    """Without the character that the end of ``head`` may have cut."""
    return codecs.getincrementaldecoder(encoding)("replace").decode(head)


def _judge_invalid(path: Path, invalid: int, characters: int, encoding: str, given: bool) -> str | None:
    if invalid <= 0:
        return None
    said = f"{path}: {invalid:,} of the first {characters:,} characters are not valid {encoding.upper()}"
    if not given and invalid >= _LEAST_INVALID and invalid > _MOST_INVALID * characters:
        raise UserError(
            f"{said}: give its --encoding (such as latin-1 or cp1252), or --encoding utf-8 to replace them by U+FFFD"
        )
    return f"{said} and become U+FFFD; if the file has another encoding, give --encoding"


class _Unpacked(io.BufferedReader):
    """A .zst file's content; the library takes a cut file's end for an end, which this does not."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise needs(path, "zstandard") from None
        super().__init__(_Zstd(path, zstandard), 1 << 20)


class _Zstd(io.RawIOBase):
    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = path.open("rb")
        self._library, self._errors = zstandard, (zstandard.ZstdError, MemoryError)
        self._unpacker = self._new()
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

    def _new(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def _unpack(self, packed: bytes) -> bytes:
        found = []
        try:
            while packed:
                found.append(self._unpacker.decompress(packed))
                packed = self._unpacker.unused_data
                self._ended = self._unpacker.eof
                if self._ended:  # more frames may follow
                    self._unpacker = self._new()
        except self._errors as error:
            raise OSError(str(error) or "not enough memory") from None
        return b"".join(found)
