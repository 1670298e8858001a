"""Load the stored settings of runs that may have been copied, moved or renamed.

A run is located by the directory in which it is found; its stored settings never refer to a previous location.
``config.yaml`` in a run's directory has paths of three forms: ``$RUN_DIR/...`` is relative to the run's directory, a
relative path is relative to the project's directory, and an absolute path is outside of both. Earlier versions stored
absolute paths only, including ``run.dir``, which is the previous location.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.common.paths import absolute
from ds_gpt2.config.model_names import hub_name
from ds_gpt2.config.output_owner import read_owner
from ds_gpt2.config.settings import (
    CHECKPOINTS,
    PATH_KEYS,
    PROJECT_DIR,
    RUNS,
    TENSORBOARD,
    Settings,
    load_settings,
    settings_of,
    to_yaml,
)
from ds_gpt2.config.settings_tree import by_name, read_tree, section_of, sections_of
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.starts import STARTS, last_start, time_of

CONFIG = "config.yaml"
HIDDEN = "(not shown)"
RESTORE = "restore it from a copy of the run"

_RUN_DIR = "$RUN_DIR"
_OUTPUTS = ("checkpoint.dir", "monitor.dir", "checkpoint.backup.to")  # never taken from a previous location of the run


def is_run_dir(directory: Path) -> bool:
    """Return whether a run has been started in ``directory``."""
    return (directory / CONFIG).is_file() and any((directory / name).exists() for name in (JOURNAL, STARTS))


def run_argument(run_dir: Path) -> str:
    """Return how the verbs name a run, quoted for a shell: a run in ``runs/`` by its name, another by its directory."""
    return shlex.quote(run_dir.name if run_dir.parent == PROJECT_DIR / RUNS else str(run_dir))


def load_run_settings(run_dir: Path, overrides: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Return the stored settings of the run found in ``run_dir``, also if it was copied or moved there.

    Args:
        overrides: see ``load_settings``.

    Raises:
        UserError: the stored settings cannot be read, or an override is wrong.
    """
    run_dir = absolute_run_dir(run_dir)
    tree = _read_stored_tree(run_dir)
    before = _last_seen(run_dir, tree)
    for key in PATH_KEYS:
        sections, name = sections_of(tree, key)
        for section in sections:
            if isinstance(text := section.get(name), str) and "://" not in text:
                section[name] = _moved(key, text, run_dir, before)
    run = tree["run"] if isinstance(tree.get("run"), dict) else {}
    tree["run"] = {**run, "name": run_dir.name, "dir": str(run_dir.parent)}
    return settings_of(tree, run_dir / CONFIG, overrides, cwd=cwd, expand=False)


def load(config: Path, overrides: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Return the settings in ``config``, which may be the stored settings of a run.

    Args:
        overrides, cwd: see ``load_settings``.

    Raises:
        UserError: see ``load_settings``.
    """
    if config.name == CONFIG and is_run_dir(config.parent):
        return load_run_settings(config.parent, overrides, cwd)
    return load_settings(config, overrides, cwd=cwd)


def event_directory(run_dir: Path) -> Path:
    """Return the directory of the TensorBoard event files of the run in ``run_dir``; it may not exist yet."""
    default = run_dir / TENSORBOARD
    try:
        configured = load_run_settings(run_dir).tensorboard_dir
    except UserError:  # settings of another version, or damaged: still show the curves
        return default
    return (
        default if default.is_dir() and not configured.is_dir() else configured
    )  # a move may leave monitor.dir behind


def absolute_run_dir(run_dir: Path) -> Path:
    """Return ``run_dir`` as an absolute path; a symbolic link is resolved if only its target has the run's name.

    Raises:
        UserError: the settings in the target of a symbolic link cannot be read.
    """
    path = absolute(run_dir)
    if not path.is_symlink():
        return path
    target = path.resolve()
    stored, _ = section_of(_read_stored_tree(target), "run.name")
    return target if stored.get("name") == target.name else path


def stored_settings(settings: Settings) -> str:
    """Return the settings as YAML for ``config.yaml``, which ``load_run_settings`` reads back."""
    return to_yaml(portable_tree(settings))


def public_tree(settings: Settings) -> dict[str, Any]:
    """Return ``portable_tree`` for files that others may read, see ``without_alert_command``."""
    return without_alert_command(portable_tree(settings))


def without_alert_command(tree: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings without ``alerts.command``, which may contain a password."""
    alerts = tree["alerts"]
    return {**tree, "alerts": {**alerts, "command": None if alerts["command"] is None else HIDDEN}}


def portable_tree(settings: Settings) -> dict[str, Any]:
    """Return the settings as nested dicts for JSON, without absolute paths into the project or the run."""
    tree = settings.model_dump(mode="json")
    for key in PATH_KEYS:
        sections, name = sections_of(tree, key)
        for section in sections:
            if isinstance(text := section.get(name), str) and "://" not in text:
                section[name] = _portable(key, text, settings.run_dir)
    del tree["run"]["dir"]
    return tree


def located(stored: Any, run_dir: Path) -> Any:
    """Return a part of ``portable_tree`` of the run in ``run_dir`` with absolute paths to files in and beside it."""
    if isinstance(stored, dict):
        return {name: located(value, run_dir) for name, value in stored.items()}
    if isinstance(stored, list):
        return [located(value, run_dir) for value in stored]
    if isinstance(stored, str) and (stored == _RUN_DIR or stored.startswith(f"{_RUN_DIR}/")):
        return os.path.normpath(run_dir / stored[len(_RUN_DIR) :].lstrip("/"))
    return stored


def write_first_settings(settings: Settings) -> None:
    """Write ``config.yaml`` of a new run, which claims the directory before anything else is written there.

    Raises:
        OSError: it cannot be written.
    """
    config = settings.run_dir / CONFIG
    if not config.exists():
        write_settings(settings)


def write_settings(settings: Settings) -> None:
    """Write ``config.yaml`` in the run's directory, readable by its owner only if it has a command for alerts.

    Raises:
        OSError: it cannot be written.
    """
    mode = 0o666 if settings.alerts.command is None else 0o600
    replace_file(settings.run_dir / CONFIG, stored_settings(settings), mode=mode)


def last_seen(run_dir: Path) -> Path:
    """Return the directory in which the run was last started: ``run_dir`` unless it was moved, renamed or copied.

    Raises:
        UserError: the stored settings cannot be read.
    """
    return _last_seen(run_dir, _read_stored_tree(run_dir))


def last_started(run_dir: Path) -> float:
    """Return when the run was last started, in seconds since 1970.

    If that is unknown, it is when its settings or, without settings, its records were written.
    """
    if (started := time_of(last_start(run_dir))) is not None:
        return started
    for name in (CONFIG, JOURNAL, STARTS, METRICS):
        with contextlib.suppress(OSError):
            return (run_dir / name).stat().st_mtime
    return 0.0


def run_of(checkpoints: Path) -> Path | None:
    """Return the directory of the run that owns the checkpoints in ``checkpoints``; None if it does not exist."""
    owner = read_owner(checkpoints)
    usual = PROJECT_DIR / RUNS / checkpoints.resolve().name
    if owner is None:
        directories = [usual]
    elif owner.directory == checkpoints.resolve():
        directories = [owner.run_dir]
    else:  # copied or moved, together with its run or into a project
        beside = checkpoints.resolve() / os.path.relpath(owner.run_dir, owner.directory)
        directories = [Path(os.path.normpath(beside)), usual]
    started = (directory for directory in directories if (directory / CONFIG).is_file())
    return next((run_dir for run_dir in started if _is_checkpoint_dir(checkpoints, run_dir)), None)


def current_settings(checkpoint: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that ``checkpoint`` was saved with, with the current paths of its run.

    Args:
        stored: the settings in its manifest.

    Returns:
        Nested dicts. If the run is not found, paths into its directory are None and ``run.dir`` is missing.

    Raises:
        UserError: the stored settings of the run cannot be read.
    """
    run_dir = run_of(checkpoint.resolve().parent)
    now = load_run_settings(run_dir).model_dump(mode="json") if run_dir is not None else {}
    tree = json.loads(json.dumps(stored))
    for key in (each for keys in PATH_KEYS for each in by_name(tree, keys)):
        sections, name = sections_of(tree, key)
        current = sections_of(now, key)[0]
        for number, section in enumerate(sections):
            if now:
                section[name] = current[number].get(name) if number < len(current) else None
            elif isinstance(text := section.get(name), str) and "://" not in text:
                section[name] = _without_run(key, text)
    if run_dir is None:
        section_of(tree, "run.dir")[0].pop("dir", None)
    else:
        section_of(tree, "run.name")[0]["name"] = run_dir.name
    return tree


def checkpoint_dirs_before(run_dir: Path) -> list[Path]:
    """Return the directories of checkpoints at the last start of the run, by its name then and its name now.

    Raises:
        UserError: the stored settings cannot be read.
    """
    tree = _read_stored_tree(run_dir)
    before = _last_seen(run_dir, tree)
    section, name = section_of(tree, "checkpoint.dir")
    text = str(section.get(name, CHECKPOINTS))
    inside = text[len(_RUN_DIR) :].lstrip("/") if text.startswith(_RUN_DIR) else None
    then = PROJECT_DIR / text if inside is None else Path(os.path.normpath(before / inside))
    return [then / before.name, then / run_dir.name]


def _read_stored_tree(run_dir: Path) -> dict[str, Any]:
    """Return the stored settings of a run as nested dicts of text.

    Raises:
        UserError: they cannot be read.
    """
    return read_tree(run_dir / CONFIG, fix=RESTORE)


def _without_run(key: str, text: str) -> str | None:
    """Return a stored path of a run that is not found; None if it is in the run's directory."""
    if key == "model.init_from" and hub_name(text) is not None:
        return text
    return None if text.startswith(_RUN_DIR) else str(PROJECT_DIR / text)


def _is_checkpoint_dir(directory: Path, run_dir: Path) -> bool:
    try:
        return load_run_settings(run_dir).checkpoint_dir.resolve() == directory.resolve()
    except UserError:  # unreadable settings
        return False


def _last_seen(run_dir: Path, tree: dict[str, Any]) -> Path:
    run, _ = section_of(tree, "run.dir")
    if isinstance(run.get("dir"), str) and os.path.isabs(run["dir"]):  # stored by an earlier version
        return Path(run["dir"]) / str(run.get("name", run_dir.name))
    recorded = last_start(run_dir).get("run_dir")
    return Path(recorded) if isinstance(recorded, str) else run_dir


def _portable(key: str, text: str, run_dir: Path) -> str:
    if key == "model.init_from" and hub_name(text) is not None:
        return text
    path = Path(os.path.abspath(text))
    if path.is_relative_to(run_dir):
        return str(Path(_RUN_DIR) / path.relative_to(run_dir))
    if path.is_relative_to(PROJECT_DIR):
        return os.path.join(
            "." if key == "model.init_from" else "", path.relative_to(PROJECT_DIR)
        )  # not a name on the hub
    base = _base(run_dir)
    if base is not None and path.is_relative_to(base):  # a sibling of the run: copied and moved with it
        return os.path.join(_RUN_DIR, os.path.relpath(path, run_dir))
    return text


def _moved(key: str, text: str, run_dir: Path, before: Path) -> str:
    """Return the current location of a stored path: paths in or beside the run move with it."""
    if text == _RUN_DIR or text.startswith(f"{_RUN_DIR}/"):
        inside = text[len(_RUN_DIR) :].lstrip("/")
        now, then = (os.path.normpath(directory / inside) for directory in (run_dir, before))
    elif os.path.isabs(text) and before != run_dir and (moved := _rebased(Path(text), before, run_dir)) is not None:
        now, then = str(moved), text
    else:
        return text
    use_old = key not in _OUTPUTS and not os.path.exists(now) and os.path.exists(then)
    return then if use_old else now


def _rebased(path: Path, before: Path, run_dir: Path) -> Path | None:
    """Return where a path in or beside the run's old directory is now; None for other paths."""
    if path.is_relative_to(before):
        return run_dir / path.relative_to(before)
    old, new = _base(before), _base(run_dir)
    if old is None or new is None or not path.is_relative_to(old):
        return None
    return new / path.relative_to(old)


def _base(run_dir: Path) -> Path | None:
    """Return the directory that contains ``runs/`` and usually ``checkpoints/``; None if it is the root."""
    base = run_dir.parent.parent
    return base if base != base.parent else None
