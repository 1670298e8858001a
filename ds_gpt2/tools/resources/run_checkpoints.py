"""Find the checkpoints of a run, or one checkpoint, by the names that users type; bytes of a run's checkpoints."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, scan
from ds_gpt2.checkpoint.listing import freed_by, unfinished
from ds_gpt2.checkpoint.naming import LATEST, MANIFEST
from ds_gpt2.checkpoint.output_check import check_outputs
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.paths import absolute
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.run_location import CONFIG, load_run_settings, run_of
from ds_gpt2.config.settings import CHECKPOINTS, PROJECT_DIR, RUNS, CheckpointSettings


@dataclass(frozen=True)
class RunCheckpoints:
    """The checkpoints in one directory, newest first."""

    directory: Path
    found: list[Generation]
    settings: CheckpointSettings | None  # of the run; None if the run is not found

    def retention_settings(self) -> CheckpointSettings:
        """Return the run's settings, or without a run those stored in the newest readable checkpoint.

        Raises:
            UserError: no checkpoint has readable settings.
        """
        if self.settings is not None:
            return self.settings
        for generation in self.found:
            with contextlib.suppress(KeyError, ValidationError):
                if generation.manifest is not None:
                    return CheckpointSettings.model_validate(generation.manifest.settings["checkpoint"])
        raise UserError(f"retention settings of {self.directory} not found: no checkpoint in it has readable settings")


def find_run_checkpoints(run: str | None) -> RunCheckpoints:
    """Return the checkpoints of a run.

    Args:
        run: a run's name or directory, or a directory of checkpoints; None: the newest run.

    Raises:
        UserError: there is no such run, its checkpoints belong to another run, or they cannot be read.
    """
    try:
        directory = bare_directory(run)
        if directory is not None:
            return RunCheckpoints(directory, scan(directory), _settings_of_run_in(directory))
        settings = load_run_settings(find_run(run))
        check_outputs(settings)
        return RunCheckpoints(settings.checkpoint_dir, scan(settings.checkpoint_dir), settings.checkpoint)
    except OSError as error:
        raise UserError(f"the checkpoints of {run or 'the newest run'} cannot be read: {reason_of(error)}") from None


def find_checkpoint(name: str | None, tag: str | None) -> Generation:
    """Return one checkpoint.

    Args:
        name: the path of a checkpoint, or a name for ``find_run_checkpoints``.
        tag: which checkpoint of a run, see ``catalog.candidates``; None: the newest.

    Raises:
        UserError: there is no such checkpoint.
    """
    if name is not None and (Path(name) / MANIFEST).is_file():
        if tag is not None:
            raise UserError(f"--tag {tag}: {name} is already a single checkpoint")
        return open_generation(Path(name))
    checkpoints = find_run_checkpoints(name)
    history = [found for found in checkpoints.found if not found.is_superseded]
    if not history:
        raise UserError(f"no checkpoints in {checkpoints.directory} yet")
    return history[0] if tag in (None, LATEST) else candidates(checkpoints.directory, str(tag))[0]


def own_bytes(directory: Path) -> int:
    """Return the bytes that deleting all checkpoints of a run would free. The run replaces them, so they count as free.

    Args:
        directory: of the run's checkpoints; 0 bytes if it does not exist or cannot be read.
    """
    try:
        return freed_by([*(generation.path for generation in scan(directory)), *unfinished(directory)])
    except OSError:
        return 0


def bare_directory(name: str | None) -> Path | None:
    """Return the directory of checkpoints that ``name`` denotes itself; None if it denotes a run.

    A backup is such a directory, and so are the checkpoints of a run whose own directory was deleted.
    """
    if name is None or (PROJECT_DIR / RUNS / name / CONFIG).is_file():
        return None
    directories = (Path(name), PROJECT_DIR / CHECKPOINTS / name)
    return next((absolute(path) for path in directories if scan(path) or unfinished(path)), None)


def _settings_of_run_in(directory: Path) -> CheckpointSettings | None:
    run_dir = run_of(directory)
    return load_run_settings(run_dir).checkpoint if run_dir is not None else None
