"""``evaluating.json`` in a run's directory: the hooks that a process has begun to evaluate and not ended.

An exception in a hook is caught. A hook that ends the process (the kernel's out-of-memory killer, a crash of a library)
would end it again after each restart. After ``_MOST`` attempts at one step it is left out there; after ``_MOST_STEPS``
such steps without a success it is left out for the rest of the run, or until the file is deleted.
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
_MOST_STEPS = 3  # each costs ``_MOST`` restarts


class _Record(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    attempts: dict[str, dict[str, int]] = {}  # hook -> step, as text -> attempts that did not end


class EvaluationAttempts:
    """Counts the attempts to evaluate each hook at each step, also over restarts. Rank 0 reads and writes the file.

    Failures to write it are ignored: then attempts are not counted.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = OpenDirectory(run_dir)
        self._attempts: dict[str, dict[str, int]] = {}

    def begun(self, step: int) -> dict[str, int]:
        """Return the attempts at ``step`` that did not end, by the hook's name; rank 0 reads the file.

        Every rank calls this before the hooks run, and then uses ``is_exhausted``.
        """
        self._attempts = collectives.broadcast_from_main(self._read)
        return {name: steps[str(step)] for name, steps in self._attempts.items() if str(step) in steps}

    def is_exhausted(self, step: int, name: str) -> bool:
        """Return whether the hook ``name`` is left out at ``step``."""
        counts = self._attempts.get(name, {})
        return counts.get(str(step), 0) >= _MOST or sum(count >= _MOST for count in counts.values()) >= _MOST_STEPS

    def begin(self, step: int, name: str) -> None:
        """Count an attempt of the hook ``name`` at ``step``."""
        counts = self._attempts.setdefault(name, {})
        counts[str(step)] = counts.get(str(step), 0) + 1
        self._write()

    def end(self, step: int, name: str, succeeded: bool) -> None:
        """Forget the attempts of the hook ``name`` at ``step``, which has ended: with metrics, or without.

        A success also shows that earlier steps do not matter. Later ones, from before a resume, still do.
        """
        counts = self._attempts.pop(name, {})
        left = {key: count for key, count in counts.items() if int(key) != step and not (succeeded and int(key) < step)}
        if left:
            self._attempts[name] = left
        self._write()

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            record = _Record.model_validate(safe_json.read(self._run_dir.path / FILE))
        except (OSError, ValueError, ValidationError):  # no file, or a damaged one
            return {}
        is_valid = all(step.isdecimal() for steps in record.attempts.values() for step in steps)
        return record.attempts if is_valid else {}

    def _write(self) -> None:
        if not collectives.is_main():
            return
        with contextlib.suppress(OSError):
            file = self._run_dir.path / FILE
            if self._attempts:
                replace_file(file, json.dumps(_Record(attempts=self._attempts).model_dump()))
            else:
                file.unlink(missing_ok=True)
