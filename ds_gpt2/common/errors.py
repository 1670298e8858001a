"""Errors that the user can fix, and error messages."""

import errno

from ds_gpt2.common.formatting import truncated

MAX_LENGTH = 1500  # characters of a message: a value from a file can be megabytes long
_MAX_REASON = 300
_WRONG_PATH = frozenset(
    {
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


class UserError(Exception):
    """An error that the user can fix: shown as one line (what, where, the fix) without a traceback; exit code 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(truncated(str(message), MAX_LENGTH))


def is_wrong_path(error: OSError) -> bool:
    """Return whether the error is caused by a wrong path, and not by a failure of the machine."""
    return error.errno in _WRONG_PATH


def reason_of(error: Exception) -> str:
    """Return the cause of an error in one line: the system's message of an OSError, else the first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return truncated(next(iter(str(error).strip().splitlines()), type(error).__name__), _MAX_REASON)


def one_line_reason(error: BaseException, limit: int = MAX_LENGTH) -> str:
    """Return the whole message of an error in one line, at most ``limit`` characters; its type if it is empty."""
    return truncated(" ".join(str(error).split()) or type(error).__name__, limit)
