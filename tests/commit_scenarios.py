"""Scenarios of the commit protocol: saves, resumes and starts whose file operations are recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from disks import RecordingDisk, Step

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import open_generation
from ds_gpt2.checkpoint.commit import write_record, write_with
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, read
from ds_gpt2.checkpoint.naming import BEST_TAG, PARTIAL, epoch_tag, rolling_tag, superseded_tag
from ds_gpt2.config.settings import CheckpointSettings

RANKS = 2
EPOCH_TAG = epoch_tag(1)
DEFAULTS = CheckpointSettings()
WEIGHTS = CheckpointSettings(epochs_as="weights", best_as="weights")


class Stage:
    """The directory ``checkpoints/<run>/`` of a scenario, and the process that works in it."""

    def __init__(self, root: Path, disk: RecordingDisk, settings: CheckpointSettings) -> None:
        self.disk = disk
        self.directory = root / "run"
        self.other_directory = root / "other"
        self.checkpoints = CheckpointDirectory(disk, self.directory, settings)
        self.settled = 0  # the number of operations before those under test; their effects are durable
        self.promised: int | None = None  # the number of operations after which the new checkpoint must exist
        self.failure: str | None = None  # why the action failed

    def save(
        self, step: int, label: str, roles: Sequence[str] = (), directory: Path | None = None, evaluated: bool = True
    ) -> None:
        directory, tag = directory or self.directory, rolling_tag(step)
        files = write_parts(self.disk, directory / (tag + PARTIAL), label)
        commit.commit(self.disk, directory, tag, manifest_of(step, files, roles, evaluated))
        if directory == self.directory:
            self.promise()
            self.checkpoints.after_commit(tag, roles)

    def evaluate(self, step: int, roles: Sequence[str]) -> None:
        """Record the evaluation in the newest checkpoint, which was saved before it."""
        path = self.directory / rolling_tag(step)
        evaluated = manifest_of(step, read(path).files, roles)
        commit.replace_manifest(self.disk, path, evaluated)
        self.checkpoints.after_commit(path.name, roles)
        self.promise()

    def resume(self, path: Path) -> None:
        self.checkpoints.resume_from(open_generation(path))
        self.promise()

    def start(self) -> None:
        self.checkpoints.start()
        self.promise()

    def promise(self) -> None:
        self.promised = len(self.disk.operations)


def write_parts(disk: Disk, partial: Path, label: str) -> dict[str, FileEntry]:
    """Write the files and records of all ranks, as before the commit; return the files by name."""
    for rank in range(RANKS):
        disk.make_directory(partial)
        files = {
            name: write_with(disk, partial / name, 0.0, functools.partial(_write, data))
            for name, data in file_contents(label).items()
            if name.endswith(f"{rank}.pt")
        }
        write_record(disk, partial, rank, files)
    records = [commit.read_record(partial, rank) for rank in range(RANKS)]
    if None in records:
        raise OSError("a rank has not written its record")
    return {name: entry for record in records if record for name, entry in record.items()}


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def file_contents(label: str, names: Iterable[str] = ("model_0.pt", "optim_0.pt", "optim_1.pt")) -> dict[str, bytes]:
    """Return the files of a checkpoint by name. They contain ``label``, a word that identifies the checkpoint."""
    return {name: f"{label} {name}".encode() for name in names}


def val_loss_of(step: int) -> float:
    return 4.0 - step / 10


def manifest_of(step: int, files: dict[str, FileEntry], roles: Sequence[str] = (), evaluated: bool = True) -> Manifest:
    """Return the manifest of a checkpoint. Its validation loss was measured only if it is saved as the best."""
    val_step = step if BEST_TAG in roles else None
    unevaluated: dict[str, float] | None = None if evaluated else {}
    state = {"step": step, "val_loss": val_loss_of(step), "val_step": val_step, "unevaluated": unevaluated}
    about: dict[str, Any] = {
        "created": "2025-01-01T00:00:00+00:00",
        "epoch": 0.5,
        "identity": {},
        "settings": {},
        "versions": {},
    }
    return Manifest(**about, state=state, roles=list(roles), world_size=RANKS, files=files)


@dataclass(frozen=True)
class Scenario:
    """A state of the directory, an action, and the expected result. Checkpoints are identified by their labels."""

    name: str
    before: Callable[[Stage], None]  # creates the initial state, which is durable
    act: Callable[[Stage], None]  # the action under test
    old: str | None = "old"  # the newest checkpoint before the action
    new: str = "new"  # the newest checkpoint after the action
    latest: str = rolling_tag(10)  # the content of ``latest`` after the action
    roles: tuple[str, ...] = ()  # the roles of the new checkpoint after the action
    best: float | None = None  # the validation loss of the best checkpoint before the action
    settings: CheckpointSettings = DEFAULTS
    links: bool = True
    replaces: bool = False  # whether the new checkpoint replaces the old one, which is deleted
    readable: bool = True  # whether ``latest`` names a checkpoint at any time, also before the next start

    def __str__(self) -> str:
        return self.name


def _two_saved(stage: Stage) -> None:
    stage.save(5, "older")
    stage.save(10, "old", [BEST_TAG])


def _saved_twice(stage: Stage) -> None:
    stage.save(10, "older")
    stage.save(10, "old")


def _best_is_old(stage: Stage) -> None:
    stage.save(5, "old", [BEST_TAG])


def _second_save(*roles: str, how: str = "", settings: CheckpointSettings = DEFAULTS) -> Scenario:
    """Save a second checkpoint with ``roles``; the first one is the best."""
    return Scenario(
        "second, as " + " and ".join(roles) + how,
        before=_best_is_old,
        act=lambda stage: stage.save(10, "new", roles),
        roles=roles,
        best=val_loss_of(5),
        settings=settings,
        links=how != ", copied",
    )


def _save_again(
    name: str, before: Callable[[Stage], None], roles: Sequence[str] = (), replaces: bool = False
) -> Scenario:
    """Save step 10, of which the initial state already has a checkpoint."""
    return Scenario(
        name,
        before,
        act=lambda stage: stage.save(10, "new", roles),
        roles=tuple(roles),
        replaces=replaces,
        readable=False,
    )


def _resume_from(
    name: str,
    before: Callable[[Stage], None],
    tag: str = rolling_tag(5),
    *,
    directory: str = "run",
    latest: str = rolling_tag(5),
    best: float | None = None,
    settings: CheckpointSettings = DEFAULTS,
) -> Scenario:
    """Resume from the checkpoint ``tag`` of a directory, which becomes ``latest``."""
    return Scenario(
        name,
        before,
        act=lambda stage: stage.resume(stage.directory.with_name(directory) / tag),
        latest=latest,
        best=best,
        settings=settings,
        readable=False,
    )


def _best_and_epoch(stage: Stage) -> None:
    stage.save(5, "new", [BEST_TAG])
    stage.save(10, "old", [EPOCH_TAG])


def _steps_5_10_15(stage: Stage) -> None:
    stage.save(5, "new")
    stage.save(10, "between")
    stage.save(15, "old")


def _same_step_elsewhere(stage: Stage) -> None:
    stage.save(5, "old")
    stage.disk.make_directory(stage.other_directory)
    stage.save(5, "new", directory=stage.other_directory)


def _two_histories(stage: Stage) -> None:
    stage.save(5, "first")
    stage.save(10, "new")
    stage.resume(stage.directory / rolling_tag(5))
    stage.save(10, "old")


def _newest_is_the_best(stage: Stage) -> None:
    stage.save(5, "new", [BEST_TAG])
    stage.save(10, "old", [EPOCH_TAG, BEST_TAG])


def _pruned_to_its_roles(stage: Stage) -> None:
    _newest_is_the_best(stage)
    commit.remove(stage.disk, stage.directory, rolling_tag(10))


def _superseded_and_again_as_epoch(stage: Stage) -> None:
    stage.save(5, "new", [BEST_TAG])
    stage.save(10, "older")
    stage.resume(stage.directory / rolling_tag(5))
    stage.save(10, "old", [EPOCH_TAG])
    commit.remove(stage.disk, stage.directory, rolling_tag(10))


def _saved_before_evaluation(stage: Stage) -> None:
    stage.save(5, "old", [BEST_TAG])
    stage.save(10, "new", evaluated=False)


def _complete_but_not_renamed(stage: Stage) -> None:
    stage.save(5, "old", [BEST_TAG])
    stage.save(10, "new")
    partial = stage.directory / (rolling_tag(10) + PARTIAL)
    stage.disk.rename(stage.directory / rolling_tag(10), partial)
    stage.checkpoints.resume_from(open_generation(stage.directory / rolling_tag(5)))


SCENARIOS = [
    Scenario("first checkpoint", before=lambda stage: None, act=lambda stage: stage.save(10, "new"), old=None),
    _second_save(EPOCH_TAG),
    _second_save(BEST_TAG),
    _second_save(EPOCH_TAG, BEST_TAG),
    _second_save(EPOCH_TAG, BEST_TAG, how=", copied"),
    _second_save(EPOCH_TAG, BEST_TAG, how=", weights only", settings=WEIGHTS),
    Scenario(
        "pruning",
        before=_two_saved,
        act=lambda stage: stage.save(15, "new"),
        latest=rolling_tag(15),
        best=val_loss_of(10),
        settings=CheckpointSettings(keep_last=1),
    ),
    _resume_from("resume from an older checkpoint", _best_and_epoch, best=val_loss_of(5)),
    _resume_from("resume from before the best", _newest_is_the_best, best=val_loss_of(5)),
    _resume_from(
        "resume from before an epoch checkpoint, with only weights as the best",
        _pruned_to_its_roles,
        best=val_loss_of(5),
        settings=CheckpointSettings(best_as="weights"),
    ),
    _resume_from(
        "resume from before an epoch checkpoint that was superseded once",
        _superseded_and_again_as_epoch,
        best=val_loss_of(5),
    ),
    _resume_from("resume from the best", _best_and_epoch, BEST_TAG, best=val_loss_of(5)),
    _resume_from("resume from the third newest", _steps_5_10_15),
    _resume_from("resume from a checkpoint of another run of the same step", _same_step_elsewhere, directory="other"),
    _resume_from(
        "resume from a superseded checkpoint of the same step",
        _two_histories,
        superseded_tag(10),
        latest=rolling_tag(10),
    ),
    _save_again("the same step again", lambda stage: stage.save(10, "old")),
    _save_again(
        "the same step again, evaluated",
        lambda stage: stage.save(10, "old", evaluated=False),
        [EPOCH_TAG, BEST_TAG],
        replaces=True,
    ),
    _save_again("the same step a third time", _saved_twice),
    Scenario(
        "evaluation",
        before=_saved_before_evaluation,
        act=lambda stage: stage.evaluate(10, [EPOCH_TAG, BEST_TAG]),
        old="new",
        roles=(EPOCH_TAG, BEST_TAG),
        best=val_loss_of(5),
    ),
    Scenario(
        "start finishes a commit",
        before=_complete_but_not_renamed,
        act=lambda stage: stage.start(),
        best=val_loss_of(5),
    ),
]


def scenario_named(name: str) -> Scenario:
    """Return the scenario with this name."""
    return next(scenario for scenario in SCENARIOS if scenario.name == name)


def prepare(scenario: Scenario, root: Path, skipped: Step | None = None) -> Stage:
    """Return a stage in the initial state of ``scenario``.

    Args:
        skipped: a call of the disk that the action does not perform.
    """
    root.mkdir()
    disk = RecordingDisk(root, links=scenario.links)
    stage = Stage(root, disk, scenario.settings)
    disk.make_directory(stage.directory)
    scenario.before(stage)
    stage.settled, stage.promised = len(disk.operations), None
    disk.skipped = skipped
    return stage


def perform(scenario: Scenario, root: Path, skipped: Step | None = None) -> Stage:
    """Return a stage on which the action of ``scenario`` was performed."""
    stage = prepare(scenario, root, skipped)
    try:
        scenario.act(stage)
    except (OSError, DamagedError) as error:
        stage.failure = f"it fails: {error}"
    return stage
