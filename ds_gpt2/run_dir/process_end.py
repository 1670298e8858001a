"""End the process of a rank without waiting for the exit handlers of libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ds_gpt2.run_dir.exit_codes import CRASHED


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a rank and end its process, also after an error: the exit handler of a library could block."""
    try:
        code = main()
    except Exception:  # print the traceback and end the process in the same way
        sys.excepthook(*sys.exc_info())
        code = CRASHED
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End a rank that has finished all its work, without Python's finalization.

    During finalization, a thread of a C++ library that still needs the interpreter can abort the process ("terminate
    called without an active exception"): a rank would fail although the run is saved and complete.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or a broken pipe
            stream.flush()
    os._exit(code)
