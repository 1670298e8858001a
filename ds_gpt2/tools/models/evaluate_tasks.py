"""The evaluations of ``eval --tasks``: published ones by name, and files of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.paths import absolute, expanded
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES, check_name, default_path
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.data.evaluation_files import load_items, measures_of
from ds_gpt2.data.items import ItemList

ALL = "all"  # of the command line: every evaluation whose file exists


@dataclass(frozen=True)
class Task:
    """The items of one evaluation."""

    name: str
    path: Path
    items: ItemList

    @property
    def measures(self) -> tuple[str, ...]:
        return measures_of(self.name)


def choose_tasks(requested: str | None, settings: Mapping[str, Any], count: int | None) -> list[Task]:
    """Return the requested evaluations.

    Args:
        requested: names separated by commas, ``NAME=FILE`` for a file of the user, or ``all``; None: none.
        settings: ``evaluations`` of the run's settings.
        count: the number of items of each, from the first; None: all.

    Raises:
        UserError: there is no such evaluation, or its file cannot be read.
    """
    found = []
    for name, path in _paths(requested, settings).items():
        items = load_items(path, name)
        found.append(Task(name, path, items if count is None else ItemList(items[:count])))
    return found


def _paths(requested: str | None, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Return the file of each requested evaluation; with ``all``, a file given for a name has priority."""
    if requested is None:
        return {}
    of_run = {name: Path(entry["path"]) for name, entry in settings.items() if entry.get("path")}
    every = _every(of_run)
    words = [word.strip() for word in requested.split(",")]
    paths: dict[str, Path] = {}
    for word in words:
        if word == ALL:
            continue
        name, path = _named(word, every)
        if paths.setdefault(name, path) != path:
            raise UserError(f"--tasks {name}: given twice, as {paths[name]} and as {path}: give each its own name")
    if ALL in words:
        paths |= {name: path for name, path in every.items() if path.exists() and name not in paths}
        if not paths:
            raise UserError("--tasks all: no evaluation is prepared: `./launch.sh prepare evaluation all`")
    return paths


def _named(word: str, every: Mapping[str, Path]) -> tuple[str, Path]:
    """Return the name and the file of one evaluation on the command line."""
    name, equals, file = (part.strip() for part in word.partition("="))
    if equals:
        if not file:
            raise UserError(f"--tasks {name}=: no file: give {name}=FILE")
        return _checked(name), absolute(expanded(f"--tasks {name}", file))
    if (path := every.get(name)) is not None:
        return name, path
    if name == "hellaswag":
        raise UserError("--tasks hellaswag: HellaSwag has an option of its own: give --hellaswag FILE")
    what = f"--tasks {name}: no such evaluation" if name else "--tasks: an empty name"
    raise UserError(f"{what}: give NAME=FILE for a file of your own, all, or one of {', '.join(every)}")


def _every(of_run: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of the run's evaluations and of all published ones."""
    found = dict(of_run)
    for name in EVALUATION_NAMES:
        if (path := default_path(name, PROJECT_DIR)) is not None and not (name in found and found[name].exists()):
            found[name] = path
    return found


def _checked(name: str) -> str:
    try:
        check_name(name)
    except ValueError as error:
        raise UserError(f"--tasks {name[:60]}: {str(error).partition(': ')[2]}") from None
    return name
