"""The record of which run writes into an output directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common import safe_json
from ds_gpt2.common.files import replace_file

OWNER = "run.json"  # in an output directory


@dataclass(frozen=True)
class Owner:
    """The run that writes into an output directory, as recorded in ``run.json`` there."""

    run_dir: Path
    directory: Path  # the output directory when the run wrote this record


def read_owner(directory: Path) -> Owner | None:
    """Return the owner of an output directory; None if there is no valid record."""
    try:
        content = safe_json.read(directory / OWNER)
        return Owner(Path(content["run_dir"]), Path(content["directory"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_owner(directory: Path, run_dir: Path) -> None:
    """Record that the run in ``run_dir`` writes into ``directory``.

    Raises:
        OSError: it cannot be written.
    """
    owner = Owner(run_dir.resolve(), directory.resolve())
    if read_owner(directory) != owner:
        content = {"run_dir": str(owner.run_dir), "directory": str(owner.directory)}
        replace_file(directory / OWNER, json.dumps(content) + "\n")
