"""How a run ended, as an exit code and as a file: DeepSpeed's launcher exits 1 even when every rank has saved."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from ds_gpt2.errors import UserError

DONE, CRASHED, MISTAKE, STOPPED = 0, 1, 2, 3
ROLLBACK = 4  # between the ranks and the supervisor only; without one it is a crash


@dataclass(frozen=True)
class Outcome:
    """What rank 0 says of the run's end."""

    code: int
    before: int | None = None  # of a rollback: go on from a checkpoint of an earlier step than this
    leave_out: tuple[int, ...] = ()  # and without these batches of the data
    alone: bool = False  # it stopped because its supervisor was gone


_LONGEST_FAILURE = 160  # characters
_VARIABLE = "DS_GPT2_OUTCOME"  # environment: the file in which rank 0 leaves its exit code


def request(file: Path) -> dict[str, str]:
    """The environment that makes a run leave its outcome in ``file``."""
    return {_VARIABLE: str(file)}


def leave(outcome: Outcome) -> None:
    """Leave ``outcome`` for whoever asked for it."""
    if _VARIABLE in os.environ:
        with contextlib.suppress(OSError):  # the run's directory is gone or its disk full: read as a crash
            Path(os.environ[_VARIABLE]).write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def read(file: Path) -> Outcome:
    """What the run left; a crash if it left nothing."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Outcome(values["code"], values["before"], tuple(values["leave_out"]), values["alone"])
    except (OSError, ValueError, KeyError, TypeError):
        return Outcome(CRASHED)


def leave_failure(rank: int, error: BaseException) -> None:
    """Leave what ended ``rank``, beside the outcome."""
    if _VARIABLE in os.environ:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        text = f"{kind}{' '.join(str(error).split())}"
        with contextlib.suppress(OSError):
            _failure(Path(os.environ[_VARIABLE]), rank).write_text(
                text[:_LONGEST_FAILURE], encoding="utf-8", errors="backslashreplace"
            )


def read_failures(file: Path, ranks: int) -> dict[int, str]:
    """What ended the ranks that could say so, beside the outcome ``file``; the first to fail comes first."""
    found = {}
    for rank in range(ranks):
        with contextlib.suppress(OSError):
            failure = _failure(file, rank)
            found[rank] = (failure.stat().st_mtime, failure.read_text(encoding="utf-8"))
    return {rank: text for rank, (_, text) in sorted(found.items(), key=lambda item: item[1])}


def _failure(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.name}.failure_{rank}")


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a rank and end its process, after an error too: a library's exit handler could wait for a service."""
    try:
        code = main()
    except Exception:  # whatever ended the rank: its traceback is printed below
        sys.excepthook(*sys.exc_info())
        code = CRASHED
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End a rank that has finished everything, without Python's own tear-down.

    In the tear-down a thread of a C++ library that still wants the interpreter aborts the process ("terminate called
    without an active exception"): seen now and then as a failed rank after a run that was saved and done.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or a broken pipe
            stream.flush()
    os._exit(code)
