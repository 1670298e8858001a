"""Make standard input and output robust: other encodings, closed descriptors, full disks; escape control characters."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import unicodedata
from typing import TextIO


def make_safe() -> None:
    """Accept any bytes as input, and escape characters in the output that the terminal's encoding does not support.

    A closed descriptor (``>&-``) is replaced by /dev/null: otherwise the next file to be opened would get its number
    and receive the output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115  # remains open
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if number == 0 else "backslashreplace")
    if logging.lastResort is not None:  # prints warnings if logging is not configured
        logging.lastResort.setFormatter(LineFormatter())


def ignore_write_errors() -> None:
    """Ignore failed writes to standard output and standard error from now on: they must not end the training."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))


def is_stdout_broken() -> bool:
    """Return whether writing to standard output fails."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def encoding_error_message(error: UnicodeEncodeError) -> str:
    """Return a message about a path or name with characters that the locale's encoding does not support."""
    text = error.object[max(0, error.start - 40) : error.end + 20]
    character = error.object[error.start]
    return f"the locale's encoding, {error.encoding}, does not support {character!r} in {text!r}: set PYTHONUTF8=1"


class Unfailing(io.TextIOBase):
    """A text stream whose writes never fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # TextIOBase has an attribute
        return self._stream.encoding

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def one_line(message: object) -> str:
    """Return a message as one line: control characters, line ends and unprintable characters are escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(message))


def print_error(message: object) -> None:
    """Print an error to standard error as one line, by one write: lines of several ranks must not mix."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.stderr.flush()


def printable_lines(text: str) -> str:
    """Return text from a file for printing: control characters are escaped, except line ends and tabs."""
    return "".join(
        each.encode("unicode_escape").decode() if each not in "\n\t" and _controls(each) else each
        for each in text.replace("\r\n", "\n")
    )


def _controls(character: str) -> bool:
    """Return whether a character controls a terminal, or the direction of the text around it."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL


class LineFormatter(logging.Formatter):
    """Escapes control characters and line ends in messages, which file names may contain; tracebacks are unchanged."""

    def format(self, record: logging.LogRecord) -> str:
        escaped = copy.copy(record)  # other handlers use the original record
        escaped.msg, escaped.args = one_line(record.getMessage()), None
        return super().format(escaped)


def printable(text: str) -> str:
    """Return text from the command line, which may contain surrogates for undecodable bytes, as valid Unicode."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
