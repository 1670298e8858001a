"""Errors that the user can fix, and error messages."""

import errno

_MAX_LENGTH = 1500  # characters of a message
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
        super().__init__(shortened(str(message)))


def shortened(text: str) -> str:
    """Return at most the first 1500 characters of ``text``: a value from a file can be megabytes long."""
    return text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + " ..."


def is_wrong_path(error: OSError) -> bool:
    """Return whether the error is caused by a wrong path, and not by a failure of the machine."""
    return error.errno in _WRONG_PATH


def reason_of(error: Exception) -> str:
    """Return the cause of an error in one line: the system's message of an OSError, else the first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
