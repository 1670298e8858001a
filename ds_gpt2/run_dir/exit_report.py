"""Report how a run ended to the process that launched its ranks, as an exit code and a message.

The exit code of DeepSpeed's launcher is not sufficient: it is 1 even after a clean stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.files import append_lines
from ds_gpt2.common.formatting import truncated


@dataclass(frozen=True)
class Outcome:
    """The end of a run, as rank 0 reports it."""

    code: int  # see ``exit_codes``
    before: int | None = None  # of a rollback: resume from a checkpoint of an earlier step than this
    leave_out: tuple[int, ...] = ()  # of a rollback: skip these batches
    supervisor_lost: bool = False  # the run stopped because its supervisor had died


_MAX_FAILURE = 160  # characters
_FILE, _PIPE = "DS_GPT2_OUTCOME", "DS_GPT2_OUTCOME_PIPE"  # environment variables: where ranks write their reports


class ExitReports:
    """The exit reports of the ranks of one launch, in the process that launches them.

    The ranks write to a pipe of this process, so a full disk or a moved directory does not matter. DeepSpeed's launcher
    does not pass on descriptors, so the ranks open the pipe through /proc; without /proc they append to a file.
    """

    def __init__(self, file: Path) -> None:
        """Create the pipe.

        Args:
            file: used by the ranks if they cannot open the pipe.
        """
        self._file = file
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[0], False)
        self._close = [weakref.finalize(self, os.close, end) for end in self._pipe]
        self._read = b""

    def request(self) -> dict[str, str]:
        """Return the environment variables that make the ranks report here."""
        status = os.fstat(self._pipe[1])
        pipe = f"/proc/{os.getpid()}/fd/{self._pipe[1]} {status.st_dev} {status.st_ino}"
        return {_FILE: str(self._file), _PIPE: pipe}

    def outcome(self) -> Outcome | None:
        """Return the outcome that rank 0 has reported; None if it has not reported."""
        for report in reversed(self._reports()):
            with contextlib.suppress(KeyError, TypeError):
                return _outcome_from(report["outcome"])
        return None

    def failures(self) -> dict[int, str]:
        """Return the errors of failed ranks by rank, the first to fail first."""
        return {report["rank"]: report["failure"] for report in self._reports() if "failure" in report}

    def kills(self) -> dict[int, str]:
        """Return the names of the signals that have killed ranks, by rank, as the launcher has seen them."""
        return {report["rank"]: report["signal"] for report in self._reports() if "signal" in report}

    def _reports(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._pipe[0], 65_536):
                self._read += block
        lines = self._read.splitlines()
        with contextlib.suppress(OSError):
            lines += self._file.read_bytes().splitlines()
        return [report for line in lines if (report := safe_json.parse_object(line)) is not None]


def report_outcome(outcome: Outcome) -> None:
    """Report ``outcome`` to the process that has launched this rank, if it reads exit reports."""
    _report({"outcome": _as_values(outcome)})


def report_failure(rank: int, error: BaseException) -> None:
    """Report the error that has ended ``rank``."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    _report({"rank": rank, "failure": truncated(f"{kind}{one_line_reason(error)}", _MAX_FAILURE)})


def report_kill(rank: int, number: int) -> None:
    """Report, in the launcher, that signal ``number`` has killed ``rank``."""
    _report({"rank": rank, "signal": signal_name(number)})


def signal_name(number: int) -> str:
    """Return the name of a signal; signals without a name, such as real-time signals, have their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _as_values(outcome: Outcome) -> dict[str, Any]:
    """Return ``outcome`` as JSON values.

    The keys must not change: a supervisor that was started before an update of the code reads what new ranks report.
    """
    return {
        "code": outcome.code,
        "before": outcome.before,
        "leave_out": outcome.leave_out,
        "alone": outcome.supervisor_lost,
    }


def _outcome_from(values: dict[str, Any]) -> Outcome:
    """Return the outcome of the JSON values ``values``.

    Raises:
        KeyError, TypeError: the values are not those of an outcome.
    """
    return Outcome(values["code"], values["before"], tuple(values["leave_out"]), supervisor_lost=values["alone"])


def _report(report: dict[str, Any]) -> None:
    """Write a report with a single system call, so that reports of several ranks are not mixed."""
    line = json.dumps(report).encode() + b"\n"
    if not _write_to_pipe(line) and _FILE in os.environ:
        with contextlib.suppress(OSError):  # the run's directory is missing or its disk is full: counts as a crash
            append_lines(Path(os.environ[_FILE]), line)


def _write_to_pipe(line: bytes) -> bool:
    path, *identity = os.environ.get(_PIPE, "-").split()
    with contextlib.suppress(OSError):
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        status = os.fstat(pipe)
        is_same_pipe = identity == [str(status.st_dev), str(status.st_ino)]  # the descriptor may have been reused
        written = os.write(pipe, line) if is_same_pipe else 0
        os.close(pipe)
        return written == len(line)
    return False
