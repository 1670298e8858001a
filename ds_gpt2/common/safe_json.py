"""Parse JSON from untrusted files, with a single kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import one_line_reason
from ds_gpt2.common.files import read_small

LARGEST = 2**64  # the largest integer: larger ones overflow in float arithmetic, or take minutes to print
END_OF_TIME = 253_402_300_800  # the year 10000 in seconds since 1970: datetime cannot represent later times


class BadJsonError(ValueError):
    """Invalid JSON, nested too deeply, or with a number out of range. The message is one line."""


def parse(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: text, or bytes in UTF-8, UTF-16 or UTF-32.
        object_pairs_hook: see ``json.loads``.

    Raises:
        BadJsonError: the text is invalid, nested too deeply, or has an integer beyond ``LARGEST``.
    """
    try:
        if isinstance(text, bytes):
            text = _decoded(text)
        if object_pairs_hook is not None:
            return json.loads(text, object_pairs_hook=object_pairs_hook, parse_int=_whole_number)
        return _DECODER.decode(text)
    except RecursionError:
        raise BadJsonError("nested too deeply") from None
    except (ValueError, OverflowError, MemoryError) as error:
        raise BadJsonError(one_line_reason(error, 200)) from None


def _decoded(text: bytes) -> str:
    encoding = json.detect_encoding(text)
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        start = len(text) - len(error.object) + error.start  # utf-8-sig counts from the end of the byte order mark
        raise BadJsonError(f"byte {start} is not text in {name}") from None


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object that ``text`` contains; None if it is invalid or another value."""
    try:
        value = parse(text)
    except BadJsonError:
        return None
    return value if isinstance(value, dict) else None


def is_time(value: object) -> bool:
    """Return whether ``value`` is a time in seconds since 1970."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < END_OF_TIME


def _whole_number(digits: str) -> int:
    if len(digits) > 21 or abs(number := int(digits)) > LARGEST:  # a sign and 20 digits
        raise ValueError(f"a number of {len(digits)} digits is out of range")
    return number


_DECODER = json.JSONDecoder(parse_int=_whole_number)  # json.loads would create a decoder at each call


def read(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: see ``read_small``.
        BadJsonError: see ``parse``.
    """
    return parse(read_small(path))
