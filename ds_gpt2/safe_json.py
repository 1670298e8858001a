"""JSON from untrusted files: a value, or one kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gpt2.safe_files import read_small


class BadJsonError(ValueError):
    """Invalid JSON, or nested too deeply. The message is one line."""


def parse(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: bytes are UTF-8, UTF-16 or UTF-32.

    Raises:
        BadJsonError: it has none, nests too deeply, or has a number that is too long.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise BadJsonError("nested too deeply") from None
    except (ValueError, OverflowError, MemoryError) as error:
        raise BadJsonError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def read(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: see ``read_small``.
        BadJsonError: see ``parse``.
    """
    return parse(read_small(path))
