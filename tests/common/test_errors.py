"""Reasons of errors in one line."""

from __future__ import annotations

import errno
import os

import pytest

from ds_gpt2.common.errors import MAX_LENGTH, UserError, one_line_reason, reason_of


@pytest.mark.parametrize(
    ("error", "first", "whole"),
    [
        (ValueError("\n a  cause\n and more "), "a  cause", "a cause and more"),
        (KeyError(), "KeyError", "KeyError"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device", None),
    ],
)
def test_a_reason_is_one_line_and_never_empty(error: Exception, first: str, whole: str | None) -> None:
    assert reason_of(error) == first
    assert whole is None or one_line_reason(error) == whole


def test_long_messages_are_truncated() -> None:
    error = UserError("x" * 10 * MAX_LENGTH)
    assert len(str(error)) == MAX_LENGTH and one_line_reason(error, 10) == "xxxxxxx..."
