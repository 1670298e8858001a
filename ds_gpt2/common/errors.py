"""The one exception that means: the user can fix this."""

import errno

_LONGEST = 1500  # characters of a message
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
    """A mistake of the user's: shown as one clear line (what, where, the fix), exit code 2, no traceback."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


def shortened(text: str) -> str:
    """The beginning of a long text: a value from a file can be megabytes long."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def is_wrong_path(error: OSError) -> bool:
    """Whether it is an error of a path that was given, and not of the machine."""
    return error.errno in _WRONG_PATH


def reason_of(error: Exception) -> str:
    """Why something failed, in one line: the system's own words of an OSError, else the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
