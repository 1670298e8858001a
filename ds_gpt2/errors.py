"""The one exception that means: the person at the keyboard can mend this."""


class UserError(Exception):
    """A mistake of the user's: shown as one clear line (what, where, the mend), exit code 2, no traceback."""
