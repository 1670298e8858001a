"""Access to huggingface_hub, which is imported only when it is needed."""

from __future__ import annotations

from typing import Any

_LONGEST_LINE = 300  # characters


def huggingface_hub() -> Any:
    """Return the module ``huggingface_hub``. Its import takes a fraction of a second."""
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def endpoint() -> str:
    """Return the URL of the hub, which ``HF_ENDPOINT`` can change."""
    return str(huggingface_hub().constants.ENDPOINT)


def first_line(error: Exception) -> str:
    """Return the first line of an error message of the library, or the name of the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST_LINE]
