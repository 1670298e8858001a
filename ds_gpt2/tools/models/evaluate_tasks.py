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
    of_run = {name: Path(entry["path"]) for name, entry in settings.items() if entry.get("path")}
    paths: dict[str, Path] = {}
    for word in [] if requested is None else requested.split(","):
        name, equals, file = (part.strip() for part in word.partition("="))
        if name == ALL and not equals:
            paths |= {each: path for each, path in _every(of_run).items() if path.exists() and each not in paths}
            if not paths:
                raise UserError("--tasks all: no evaluation is prepared: `./launch.sh prepare evaluation all`")
        elif equals:
            paths[_checked(name)] = absolute(expanded(f"--tasks {name}", file))
        elif (path := _every(of_run).get(name)) is not None:
            paths[name] = path
        else:
            raise UserError(
                f"--tasks {name}: no such evaluation: give NAME=FILE for a file of your own, all, or one of"
                f" {', '.join(_every(of_run))}"
            )
    return paths


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
