"""``evaluating.json`` in a run's directory: the hooks that a process has begun to evaluate and not ended.

An exception in a hook is caught. A hook that ends the process (the kernel's out-of-memory killer, a crash of a library)
would end it again after each restart: after ``_MOST`` attempts at one step it is left out there.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import replace_file
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.distributed import collectives

FILE = "evaluating.json"
_MOST = 2  # of a hook at one step: what ended the first one may have had another cause


class _Record(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int
    attempts: dict[str, int]  # by the hook's name


class EvaluationAttempts:
    """Counts the attempts to evaluate each hook at a step, also over restarts. Rank 0 reads and writes the file.

    Failures to write it are ignored: then attempts are not counted.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = OpenDirectory(run_dir)
        self._record = _Record(step=-1, attempts={})

    def exhausted(self, step: int) -> set[str]:
        """Return the names of the hooks to leave out at ``step``. Every rank calls this before the hooks run."""
        return collectives.broadcast_from_main(lambda: self._exhausted(step))

    def begin(self, step: int, name: str) -> None:
        """Count an attempt of the hook ``name`` at ``step``."""
        if self._record.step != step:
            self._record = _Record(step=step, attempts={})
        self._record.attempts[name] = self._record.attempts.get(name, 0) + 1
        self._write()

    def end(self, name: str) -> None:
        """Forget the attempts of the hook ``name``: it has returned, was interrupted, or raised an exception."""
        self._record.attempts.pop(name, None)
        self._write()

    def _exhausted(self, step: int) -> set[str]:
        self._record = self._read()
        attempts = self._record.attempts if self._record.step == step else {}
        return {name for name, count in attempts.items() if count >= _MOST}

    def _read(self) -> _Record:
        try:
            return _Record.model_validate(safe_json.read(self._run_dir.path / FILE))
        except (OSError, ValueError, ValidationError):  # no file, or a damaged one
            return _Record(step=-1, attempts={})

    def _write(self) -> None:
        if not collectives.is_main():
            return
        with contextlib.suppress(OSError):
            file = self._run_dir.path / FILE
            if self._record.attempts:
                replace_file(file, json.dumps(self._record.model_dump()))
            else:
                file.unlink(missing_ok=True)
