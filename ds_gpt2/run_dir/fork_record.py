"""``fork.json`` in a run's directory: the run and the checkpoint from which it was forked, written once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file, sync_directory
from ds_gpt2.common.safe_json import LARGEST

FORK = "fork.json"


@dataclass(frozen=True)
class Ancestor:
    """A run from which a parent was forked."""

    run: str
    step: int


@dataclass(frozen=True)
class Fork:
    """The parent of a run: it began with the state of this checkpoint of another run."""

    run: str  # the parent's name
    run_dir: str  # its directory at the time of the fork; it may be moved or deleted since
    tag: str  # of the parent's checkpoint
    step: int  # of the checkpoint: the fork trains from the next one on, see ``first_step_of``
    time: str  # of the fork, in the form of ``starts.TIME``
    ancestors: tuple[Ancestor, ...] = ()  # of the parent, its own parent first

    def __str__(self) -> str:
        return f"{self.run} at step {self.step:,}"

    @property
    def lineage(self) -> str:
        """The parent and its ancestors in one line."""
        return ", ".join([str(self), *(f"itself forked from {each.run} at {each.step:,}" for each in self.ancestors)])


def write_fork(run_dir: Path, fork: Fork) -> None:
    """Write the record durably.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(run_dir / FORK, json.dumps(asdict(fork), indent=1) + "\n", durable=True)
    sync_directory(run_dir)


def read_fork(run_dir: Path) -> Fork | None:
    """Return the parent of the run in ``run_dir``; None if the run is not a fork.

    Raises:
        UserError: the record exists, but cannot be read or is damaged.
    """
    file = run_dir / FORK
    try:
        return _fork_of(safe_json.read(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; check its permissions and its disk") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} is damaged: restore it from a copy of the run") from None


def first_step_of(run_dir: Path) -> int:
    """Return the step after which the run trains: 0 unless it is a fork.

    If the parent's evaluation of this step was not complete, the fork repeats it and records the step too.

    Raises:
        UserError: see ``read_fork``.
    """
    fork = read_fork(run_dir)
    return 0 if fork is None else fork.step


def _fork_of(content: dict[str, Any]) -> Fork:
    texts = {name: content[name] for name in ("run", "run_dir", "tag", "time")}
    ancestors = tuple(Ancestor(str(each["run"]), _step(each["step"])) for each in content["ancestors"])
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a text is missing")
    return Fork(**texts, step=_step(content["step"]), ancestors=ancestors)


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError("not a step")
    return value
