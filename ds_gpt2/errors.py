"""The one exception that means: the person at the keyboard can mend this."""


class UserError(Exception):
    """A mistake of the user's: shown as one clear line (what, where, the mend), exit code 2, no traceback."""


def reason_of(error: Exception) -> str:
    """Why something failed, in one line: the system's own words of an OSError, else the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
