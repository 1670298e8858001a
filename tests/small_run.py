"""The model and the data of tests that train."""

from __future__ import annotations

from typing import Any

SEQUENCE = 64
MODEL = {"layers": 2, "heads": 2, "width": 32, "dropout": 0.1}  # dropout, so that a resume needs the random state


def hellaswag_item(number: int) -> dict[str, Any]:
    """Return an item in the format of the original file."""
    context = f"Statement {number} of a program is read."
    endings = [f"It {verb} {number} times." for verb in ("runs", "fails", "waits", "ends")]
    ours = {"ctx_a": context, "ctx_b": "", "ctx": context, "endings": endings, "label": number % 4}
    return {"activity_label": "Reading", **ours}
