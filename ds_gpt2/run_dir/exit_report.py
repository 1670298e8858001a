"""How a run ended, as an exit code and in words: DeepSpeed's launcher exits 1 even when every rank has saved."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import append_lines

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
_FILE, _PIPE = "DS_GPT2_OUTCOME", "DS_GPT2_OUTCOME_PIPE"  # environment: where ranks leave what they have to say


class ExitReports:
    """What the ranks of one start say of their end.

    They write it into a pipe of this process, which no full disk or moved directory keeps from it. DeepSpeed's launcher
    passes no descriptors on, so they find the pipe below /proc; where there is none, they use files.
    """

    def __init__(self, file: Path) -> None:
        """
        Args:
            file: used where there is no pipe, with others beside it.
        """
        self._file = file
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)
        self._close = [weakref.finalize(self, os.close, end) for end in self._pipe]
        self._read = b""

    def request(self) -> dict[str, str]:
        """The environment that makes a run leave its last words here."""
        status = os.fstat(self._pipe[1])
        pipe = f"/proc/{os.getpid()}/fd/{self._pipe[1]} {status.st_dev} {status.st_ino}"
        return {_FILE: str(self._file), _PIPE: pipe}

    def outcome(self) -> Outcome | None:
        """What rank 0 has said of the run's end; None if it has said nothing."""
        for word in reversed(self._words()):
            with contextlib.suppress(KeyError, TypeError):
                values = word["outcome"]
                return Outcome(values["code"], values["before"], tuple(values["leave_out"]), values["alone"])
        return None

    def failures(self) -> dict[int, str]:
        """What ended the ranks that could say so, the first to fail first."""
        return {word["rank"]: word["failure"] for word in self._words() if "failure" in word}

    def _words(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._pipe[0], 65_536):
                self._read += block
        lines = self._read.splitlines()
        with contextlib.suppress(OSError):
            lines += self._file.read_bytes().splitlines()
        return [word for line in lines if (word := _parsed(line)) is not None]


def report_outcome(outcome: Outcome) -> None:
    """Leave ``outcome`` for whoever asked for it."""
    _leave({"outcome": asdict(outcome)})


def report_failure(rank: int, error: BaseException) -> None:
    """Leave what ended ``rank``."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = f"{kind}{' '.join(str(error).split())}"
    _leave({"rank": rank, "failure": text[:_LONGEST_FAILURE]})


def _leave(word: dict[str, Any]) -> None:
    """In one write, which is never mixed with another's."""
    line = json.dumps(word).encode() + b"\n"
    if not _write_to_pipe(line) and _FILE in os.environ:
        with contextlib.suppress(OSError):  # the run's directory is gone or its disk full: read as a crash
            append_lines(Path(os.environ[_FILE]), line)


def _write_to_pipe(line: bytes) -> bool:
    path, *identity = os.environ.get(_PIPE, "-").split()
    with contextlib.suppress(OSError):
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        status = os.fstat(pipe)
        is_meant = identity == [str(status.st_dev), str(status.st_ino)]  # and not what has its number now
        written = os.write(pipe, line) if is_meant else 0
        os.close(pipe)
        return written == len(line)
    return False


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        word = safe_json.parse(line)
        return word if isinstance(word, dict) else None
    except ValueError:
        return None


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
