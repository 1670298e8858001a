"""Standard input and output that end no program: another encoding, a closed descriptor, a full disk behind them."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import unicodedata
from typing import TextIO


def make_safe() -> None:
    """Have any character be printed, escaped where the terminal's encoding lacks it, and any bytes be read.

    A descriptor that is closed (``>&-``) becomes /dev/null: otherwise the next file to be opened would take its
    number, and get what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115  # it stays open
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if number == 0 else "backslashreplace")
    if logging.lastResort is not None:  # shows warnings where no log is open
        logging.lastResort.setFormatter(LineFormatter())


def ignore_write_errors() -> None:
    """From here on output that cannot be written is lost: training is worth more than what it prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))


def is_stdout_broken() -> bool:
    """Whether standard output takes nothing more."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def encoding_error_message(error: UnicodeEncodeError) -> str:
    """One line for a path or name with characters that the locale's encoding lacks."""
    text = error.object[max(0, error.start - 40) : error.end + 20]
    return (
        f"the locale's encoding, {error.encoding}, has no {error.object[error.start]!r} of {text!r}: set PYTHONUTF8=1"
    )


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
        except (OSError, ValueError):  # ValueError: it is closed
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


_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def one_line(message: object) -> str:
    """Return a message as one line: control characters, line ends among them, and what cannot be shown are escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(message))


def printable_lines(text: str) -> str:
    """Text from a file for a terminal: control characters are escaped, except for line ends and tabs."""
    return "".join(
        each.encode("unicode_escape").decode() if each not in "\n\t" and _controls(each) else each
        for each in text.replace("\r\n", "\n")
    )


def _controls(character: str) -> bool:
    """Whether a character controls a terminal, or the direction of the text around it."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


class LineFormatter(logging.Formatter):
    """Escapes control characters and line ends in messages: a file's name, for one, may have any. Not in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        escaped = copy.copy(record)  # other handlers get the record, too
        escaped.msg, escaped.args = one_line(record.getMessage()), None
        return super().format(escaped)


def printable(text: str) -> str:
    """Text from the command line, whose bytes may not be of the locale's encoding, as text that UTF-8 can hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
