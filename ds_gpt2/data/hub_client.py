"""Access to huggingface_hub, which is imported only when it is needed; retries of its requests."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ds_gpt2.common.errors import reason_of

log = logging.getLogger(__name__)

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # in the messages of hf_xet, which downloads large files

Result = TypeVar("Result")


def huggingface_hub() -> Any:
    """Return the module ``huggingface_hub``. Its import takes a fraction of a second."""
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def endpoint() -> str:
    """Return the URL of the hub, which ``HF_ENDPOINT`` can change."""
    return str(huggingface_hub().constants.ENDPOINT)


def with_retries(request: Callable[[], Result], what: str, attempts: int, longest_pause: float) -> Result:
    """Return the result of ``request``; after temporary errors retry it with growing pauses.

    Args:
        what: the requested object, for warnings.
        attempts: largest number of calls of ``request``.
        longest_pause: seconds.

    Raises:
        Exception: the error of the last attempt, or the first error that is not temporary.
    """
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:  # the HTTP library differs between versions of huggingface_hub
            if attempt == attempts - 1 or not _is_temporary(error):
                raise
            pause = min(longest_pause, 2.0**attempt)
            log.warning(f"{what}: {reason_of(error)}; retrying in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def is_not_found(error: Exception) -> bool:
    """Return whether the hub has no such repository, revision or file, or denies access to it."""
    errors = huggingface_hub().errors
    if isinstance(error, errors.LocalEntryNotFoundError):  # without network: the file is not in the cache
        return False
    return isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError))


def disk_problem(error: Exception) -> str | None:
    """Return the system's message if a download cannot be stored (full disk, missing permission, ...); else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_ERROR.search(str(error))) is not None:
        number = int(found[1])
    return None if number is None or number not in _DISK_ERRORS else os.strerror(number)


def _is_temporary(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    if is_not_found(error) or disk_problem(error) is not None:
        return False
    return isinstance(error, (OSError, RuntimeError)) or "http" in type(error).__module__
