"""Runs by what a person calls them."""

from __future__ import annotations

from pathlib import Path

from ds_gpt2.config import PROJECT_DIR, load_settings
from ds_gpt2.errors import UserError


def started_runs() -> list[Path]:
    """The directories of all runs, the one started last at the end."""
    configs = sorted((PROJECT_DIR / "runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    return [config.parent for config in configs]


def find_run(name: str | None) -> Path:
    """The directory of a run by name, by path, or of the one started last.

    Raises:
        UserError: there is no such run.
    """
    runs, started = PROJECT_DIR / "runs", started_runs()
    if name is None:
        if not started:
            raise UserError(f"no runs in {runs} yet: start one with `./launch.sh quickstart`")
        return started[-1]
    for path in (runs / name, Path(name)):
        if (path / "config.yaml").is_file():
            return path
    of_checkpoints = runs / Path(name).name  # where NAME is checkpoints/<run>, and not a backup of them
    if (of_checkpoints / "config.yaml").is_file():
        settings = load_settings(of_checkpoints / "config.yaml")
        if settings.checkpoint_dir.resolve() == Path(name).resolve():
            return of_checkpoints
    known = ", ".join(run_dir.name for run_dir in started) or "none"
    raise UserError(f"no run {name}: known in {runs} are {known}")
