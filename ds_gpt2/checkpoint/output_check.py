"""Check that no two runs write into the same directory, and that a moved run has its checkpoints."""

from __future__ import annotations

from pathlib import Path

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.output_owner import read_owner
from ds_gpt2.config.run_location import CONFIG, is_run_dir, load_run_settings
from ds_gpt2.config.settings import Settings


def check_outputs(settings: Settings) -> None:
    """Check that the run's output directories are its own.

    Raises:
        UserError: another run writes there, or the run was moved and its checkpoints were not.
    """
    for directory in settings.shared_output_dirs:
        if (other := _other_owner(directory, settings)) is not None:
            key = "checkpoint.dir" if directory == settings.checkpoint_dir else "monitor.dir"
            raise UserError(
                f"{directory} belongs to the run in {other}, not to the one in {settings.run_dir}: set {key} to another"
                " directory, or choose another run.name"
            )
    if (left := _checkpoints_elsewhere(settings)) is not None:
        verb = "move" if run_location.run_of(left) in (None, settings.run_dir) else "copy"
        raise UserError(
            f"run {settings.run.name} has no checkpoints in {settings.checkpoint_dir}, but it has some in {left}:"
            f" {verb} that directory to {settings.checkpoint_dir}"
            + (f", or set checkpoint.dir={left.parent}" if left.name == settings.run.name else "")
        )


def _other_owner(directory: Path, settings: Settings) -> Path | None:
    """Return the directory of another run that writes into ``directory``; None if there is none."""
    run_dir = settings.run_dir.resolve()
    if (owner := read_owner(directory)) is not None:
        moved = owner.directory != directory.resolve()  # or copied, together with its run
        return owner.run_dir if not moved and owner.run_dir != run_dir and is_run_dir(owner.run_dir) else None
    if not (settings.run_dir / CONFIG).is_file() or not directory.is_dir():
        return None
    before = run_location.last_seen(settings.run_dir)  # an earlier version recorded no owner
    if before.resolve() == run_dir or not is_run_dir(before):
        return None
    try:
        theirs = load_run_settings(before).shared_output_dirs
    except UserError:  # its settings cannot be read: there is no evidence that it writes there
        return None
    return before if directory.resolve() in [path.resolve() for path in theirs] else None


def _checkpoints_elsewhere(settings: Settings) -> Path | None:
    """Return a directory with checkpoints of the run if its own has none; None if there is no such directory."""
    if newest_tag(settings.checkpoint_dir) is not None or commit.has_unfinished_commit(settings.checkpoint_dir):
        return None
    if not (settings.run_dir / CONFIG).is_file():
        return None
    earlier = [load_run_settings(settings.run_dir).checkpoint_dir]
    earlier += run_location.checkpoint_dirs_before(settings.run_dir)
    earlier.append(settings.checkpoint.dir / run_location.last_seen(settings.run_dir).name)
    return next((path for path in earlier if path != settings.checkpoint_dir and newest_tag(path) is not None), None)
