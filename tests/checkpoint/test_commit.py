"""The commit protocol, proved: power cuts and kills at any time, each step left out, each call of the disk failing.

A scenario is acted out once, its file operations recorded. ``crash_states`` tells what a power cut may leave of them;
each such state is laid out on a real disk and recovered from as a restarted run does.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import pytest
import torch
from crash_states import KilledError, Kind, Operation, RecordingDisk, Step, Tree, crash_states, materialise

from ds_gpt2.checkpoint import catalog, commit, manifest, weights
from ds_gpt2.checkpoint import save as writer
from ds_gpt2.checkpoint.catalog import Generation, open_generation, scan
from ds_gpt2.checkpoint.commit import write_record, write_with
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest
from ds_gpt2.checkpoint.naming import (
    BEST_TAG,
    LATEST,
    MANIFEST,
    PARTIAL,
    epoch_tag,
    role_of,
    rolling_tag,
    superseded_tag,
)
from ds_gpt2.checkpoint.save import Save
from ds_gpt2.checkpoint.weights import WEIGHTS_FILE
from ds_gpt2.config.settings import CheckpointSettings

T = TypeVar("T")
RANKS = 2
EPOCH_TAG = epoch_tag(1)
MOST_STATES = 260  # of one number of operations
MOST_AFTER_A_KILL = 12
MOST_OF_A_MUTANT = 20
DEFAULTS = CheckpointSettings()
WEIGHTS = CheckpointSettings(epochs_as="weights", best_as="weights")
NEVER_WRITTEN = "what was never written"


class Stage:
    """``checkpoints/<run>/`` of a scenario and the process that works in it."""

    def __init__(self, root: Path, disk: RecordingDisk, settings: CheckpointSettings) -> None:
        self.disk = disk
        self.directory = root / "run"
        self.elsewhere = root / "other"
        self.house = CheckpointDirectory(disk, self.directory, settings)
        self.settled = 0  # operations before what is looked at
        self.promised: int | None = None  # operations after which the new checkpoint must be there
        self.failure: str | None = None  # why the act ended early

    def save(
        self, step: int, label: str, roles: Sequence[str] = (), directory: Path | None = None, evaluated: bool = True
    ) -> None:
        directory, tag = directory or self.directory, rolling_tag(step)
        files = _write_parts(self.disk, directory / (tag + PARTIAL), label)
        commit.commit(self.disk, directory, tag, _manifest(step, files, roles, evaluated))
        if directory == self.directory:
            self.promise()
            self.house.after_commit(tag, roles)

    def resume(self, path: Path) -> None:
        self.house.resume_from(open_generation(path))
        self.promise()

    def start(self) -> None:
        self.house.start()
        self.promise()

    def promise(self) -> None:
        self.promised = len(self.disk.operations)


def _write_parts(disk: Disk, partial: Path, label: str) -> dict[str, FileEntry]:
    """What all ranks write before rank 0 commits."""
    for rank in range(RANKS):
        disk.make_directory(partial)
        files = {
            name: write_with(disk, partial / name, 0.0, lambda file, data=data: file.write(data) and None)
            for name, data in _payload(label).items()
            if name.endswith(f"{rank}.pt")
        }
        write_record(disk, partial, rank, files)
    records = [commit.read_record(partial, rank) for rank in range(RANKS)]
    if None in records:
        raise OSError("a rank is waited for in vain")
    return {name: entry for record in records if record for name, entry in record.items()}


def _payload(label: str, names: Iterable[str] = ("model_0.pt", "optim_0.pt", "optim_1.pt")) -> dict[str, bytes]:
    """The files of a checkpoint; ``label`` is a word that tells it from others."""
    return {name: f"{label} {name}".encode() for name in names}


def _val_loss(step: int) -> float:
    return 4.0 - step / 10


def _manifest(step: int, files: dict[str, FileEntry], roles: Sequence[str] = (), evaluated: bool = True) -> Manifest:
    """Its loss was measured where it is to be the best."""
    state = {"step": step, "val_loss": _val_loss(step), "val_step": step if BEST_TAG in roles else None}
    state["unevaluated"] = None if evaluated else {}
    about = {"created": "2025-01-01T00:00:00+00:00", "epoch": 0.5, "identity": {}, "settings": {}, "versions": {}}
    return Manifest(**about, state=state, roles=list(roles), world_size=RANKS, files=files)


@dataclass(frozen=True)
class Scenario:
    name: str
    before: Callable[[Stage], None]  # on the medium, whatever comes
    act: Callable[[Stage], None]
    old: str | None  # the label of the newest checkpoint before
    new: str
    latest: str  # what ``latest`` says in the end
    roles: tuple[str, ...] = ()  # what the new checkpoint is known as in the end
    best: float | None = None  # its loss before
    settings: CheckpointSettings = DEFAULTS
    links: bool = True
    replaces: bool = False  # whether the new one has all of the old one, which goes
    readable: bool = True  # whether there is a checkpoint, and ``latest`` names one, also before a run is started again

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


def _replaced_by(*roles: str, how: str = "", settings: CheckpointSettings = DEFAULTS) -> Scenario:
    return Scenario(
        "second, as " + " and ".join(roles) + how,
        before=_best_is_old,
        act=lambda stage: stage.save(10, "new", roles),
        old="old",
        new="new",
        latest=rolling_tag(10),
        roles=roles,
        best=_val_loss(5),
        settings=settings,
        links=how != ", copied",
    )


def _three_with_epoch(stage: Stage) -> None:
    stage.save(5, "new", [BEST_TAG])
    stage.save(10, "old", [EPOCH_TAG])


def _steps_5_10_15(stage: Stage) -> None:
    stage.save(5, "new")
    stage.save(10, "between")
    stage.save(15, "old")


def _same_step_elsewhere(stage: Stage) -> None:
    stage.save(5, "old")
    stage.disk.make_directory(stage.elsewhere)
    stage.save(5, "new", directory=stage.elsewhere)


def _history_taken_twice(stage: Stage) -> None:
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


def _complete_but_not_renamed(stage: Stage) -> None:
    stage.save(5, "old", [BEST_TAG])
    stage.save(10, "new")
    partial = stage.directory / (rolling_tag(10) + PARTIAL)
    stage.disk.rename(stage.directory / rolling_tag(10), partial)
    stage.house.resume_from(open_generation(stage.directory / rolling_tag(5)))


SCENARIOS = [
    Scenario(
        "first ever",
        before=lambda stage: None,
        act=lambda stage: stage.save(10, "new"),
        old=None,
        new="new",
        latest=rolling_tag(10),
    ),
    _replaced_by(EPOCH_TAG),
    _replaced_by(BEST_TAG),
    _replaced_by(EPOCH_TAG, BEST_TAG),
    _replaced_by(EPOCH_TAG, BEST_TAG, how=", copied"),
    _replaced_by(EPOCH_TAG, BEST_TAG, how=", weights only", settings=WEIGHTS),
    Scenario(
        "pruning",
        before=_two_saved,
        act=lambda stage: stage.save(15, "new"),
        old="old",
        new="new",
        latest=rolling_tag(15),
        best=_val_loss(10),
        settings=CheckpointSettings(keep_last=1),
    ),
    Scenario(
        "resume from an older one",
        before=_three_with_epoch,
        act=lambda stage: stage.resume(stage.directory / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        best=_val_loss(5),
        readable=False,
    ),
    Scenario(
        "resume from before the best",
        before=_newest_is_the_best,
        act=lambda stage: stage.resume(stage.directory / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        best=_val_loss(5),
        readable=False,
    ),
    Scenario(
        "resume from before an epoch's end of which only weights are the best",
        before=_pruned_to_its_roles,
        act=lambda stage: stage.resume(stage.directory / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        best=_val_loss(5),
        readable=False,
        settings=CheckpointSettings(best_as="weights"),
    ),
    Scenario(
        "resume from before an epoch's end that was superseded once",
        before=_superseded_and_again_as_epoch,
        act=lambda stage: stage.resume(stage.directory / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        best=_val_loss(5),
        readable=False,
    ),
    Scenario(
        "resume from the best",
        before=_three_with_epoch,
        act=lambda stage: stage.resume(stage.directory / BEST_TAG),
        old="old",
        new="new",
        latest=rolling_tag(5),
        best=_val_loss(5),
        readable=False,
    ),
    Scenario(
        "resume from the one before the one before",
        before=_steps_5_10_15,
        act=lambda stage: stage.resume(stage.directory / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        readable=False,
    ),
    Scenario(
        "resume from another run's of the same step",
        before=_same_step_elsewhere,
        act=lambda stage: stage.resume(stage.elsewhere / rolling_tag(5)),
        old="old",
        new="new",
        latest=rolling_tag(5),
        readable=False,
    ),
    Scenario(
        "resume from a superseded one of the same step",
        before=_history_taken_twice,
        act=lambda stage: stage.resume(stage.directory / superseded_tag(10)),
        old="old",
        new="new",
        latest=rolling_tag(10),
        readable=False,
    ),
    Scenario(
        "the same step again",
        before=lambda stage: stage.save(10, "old"),
        act=lambda stage: stage.save(10, "new"),
        old="old",
        new="new",
        latest=rolling_tag(10),
        readable=False,
    ),
    Scenario(
        "the same step again, evaluated",
        before=lambda stage: stage.save(10, "old", evaluated=False),
        act=lambda stage: stage.save(10, "new", [EPOCH_TAG, BEST_TAG]),
        old="old",
        new="new",
        latest=rolling_tag(10),
        roles=(EPOCH_TAG, BEST_TAG),
        replaces=True,
        readable=False,
    ),
    Scenario(
        "the same step a third time",
        before=_saved_twice,
        act=lambda stage: stage.save(10, "new"),
        old="old",
        new="new",
        latest=rolling_tag(10),
        readable=False,
    ),
    Scenario(
        "start finishes a commit",
        before=_complete_but_not_renamed,
        act=lambda stage: stage.start(),
        old="old",
        new="new",
        latest=rolling_tag(10),
        best=_val_loss(5),
    ),
]


def _scenario(name: str) -> Scenario:
    return next(scenario for scenario in SCENARIOS if scenario.name == name)


def _staged(scenario: Scenario, root: Path, skipped: Step | None = None) -> Stage:
    """A stage on which ``before`` has happened."""
    root.mkdir()
    disk = RecordingDisk(root, links=scenario.links)
    stage = Stage(root, disk, scenario.settings)
    disk.make_directory(stage.directory)
    scenario.before(stage)
    stage.settled, stage.promised = len(disk.operations), None
    disk.skipped = skipped
    return stage


def _acted(scenario: Scenario, root: Path, skipped: Step | None = None) -> Stage:
    stage = _staged(scenario, root, skipped)
    try:
        scenario.act(stage)
    except (OSError, DamagedError) as error:
        stage.failure = f"it fails: {error}"
    return stage


@dataclass(frozen=True)
class Recovery:
    """What is found where the power was cut; checkpoints by their label."""

    read: str | None  # the newest good one, for somebody who only reads
    known: frozenset[tuple[str, str]]  # tag and label of all good ones, for somebody who only reads
    pointed: str | None  # what ``latest`` says, for somebody who only reads
    lost_by_reader: bool  # whether ``latest`` names no checkpoint, for somebody who only reads
    resumed: str | None  # the newest good one once a run has been started
    labels: frozenset[str]  # then: of all good ones that can be resumed from
    torn: tuple[str, ...]  # then: what passes for a checkpoint and is none
    best: float | None  # then: the loss of the best
    latest: str | None  # then
    dangling: bool  # then: whether ``latest`` names no checkpoint
    partial: tuple[str, ...]  # then


def _recover(tree: Tree, root: Path) -> Recovery:
    materialise(tree, root)
    directory, disk = root / "run", RecordingDisk(root)
    listed = scan(directory)
    before, pointed, lost_by_reader = _labels(listed), _latest(directory), _dangling(directory)
    CheckpointDirectory(disk, directory, DEFAULTS).start()
    if disk.operations:
        listed = scan(directory)
    after = _labels(listed)
    best = [found.manifest.val_loss for found in listed if found.role == "best" and found.manifest]
    return Recovery(
        read=_newest(before),
        known=frozenset((found.tag, label) for found, label in before),
        pointed=pointed,
        lost_by_reader=lost_by_reader,
        resumed=_newest(after),
        labels=frozenset(label for found, label in after if not found.weights_only),
        torn=tuple({found.tag for found in listed} - {found.tag for found, _ in after}),
        best=best[0] if best else None,
        latest=_latest(directory),
        dangling=_dangling(directory),
        partial=tuple(path.name for path in directory.glob("*" + PARTIAL)),
    )


def _labels(listed: Iterable[Generation]) -> list[tuple[Generation, str]]:
    """Those that verify, in the same order, and which they are."""
    return [(found, _label(found)) for found in listed if catalog.problem_of(found) is None]


def _label(found: Generation) -> str:
    assert found.manifest is not None
    content = {name: (found.path / name).read_bytes() for name in found.manifest.files}
    label = _first_word(next(iter(content.values())))
    expected = _payload(label, [WEIGHTS_FILE]) if found.weights_only else _payload(label)
    return label if content == expected else NEVER_WRITTEN


def _first_word(content: bytes) -> str:
    return content.decode().split()[0]


def _newest(found: Iterable[tuple[Generation, str]]) -> str | None:
    """What a run would go on from."""
    return next((label for one, label in found if one.role != "superseded" and not one.weights_only), None)


def _latest(directory: Path) -> str | None:
    path = directory / LATEST
    return path.read_bytes().decode(errors="replace") if path.exists() else None


def _dangling(directory: Path) -> bool:
    """Whether DeepSpeed's tools, which know no better than to trust ``latest``, would fail."""
    latest = _latest(directory)
    return latest is not None and (role_of(latest) is None or not (directory / latest / MANIFEST).exists())


class Laboratory:
    """Recovers from states, from equal ones once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = itertools.count()
        self._known: dict[Tree, Recovery] = {}

    def folder(self) -> Path:
        return self._folder / str(next(self._folders))

    def recover(self, tree: Tree) -> Recovery:
        if tree not in self._known:
            self._known[tree] = _recover(tree, self._folder / "state")
        return self._known[tree]

    @property
    def distinct(self) -> int:
        return len(self._known)


def _unsafe(scenario: Scenario, allowed: set[str | None], found: Recovery) -> Iterator[str]:
    """What must never be, whenever the power fails."""
    if found.resumed not in allowed:
        yield f"a run would go on from {found.resumed}"
    if scenario.old not in {None, *found.labels} and not (scenario.replaces and scenario.new in found.labels):
        yield f"{scenario.old}, which a person may want back, is lost"
    if found.torn:
        yield f"{found.torn} pass for checkpoints"
    if found.dangling:
        yield f"latest says {found.latest!r}, which is no checkpoint"
    if scenario.best is not None and (found.best is None or found.best > scenario.best):
        yield f"the best was {scenario.best}, is {found.best}"
    if found.partial:
        yield f"{found.partial} are left"
    if scenario.readable and (found.read not in allowed or found.lost_by_reader):
        yield f"a reader finds {found.read}, and latest is {'lost' if found.lost_by_reader else 'good'}"


def _broken_promises(scenario: Scenario, found: Recovery) -> Iterator[str]:
    """What must be once all is done and has returned."""
    if found.pointed != scenario.latest:
        yield f"latest was moved to {scenario.latest}, says {found.pointed}"
    for role in scenario.roles:
        if (role, scenario.new) not in found.known:
            yield f"{role} was made, is not there"


def _violations(scenario: Scenario, stage: Stage, number: int, found: Recovery) -> Iterator[str]:
    """What is wrong with a state after ``number`` operations."""
    promised = stage.promised is not None and number >= stage.promised
    yield from _unsafe(scenario, {scenario.new} if promised else {scenario.old, scenario.new}, found)
    if promised and found.read != scenario.new:
        yield f"the new checkpoint was promised, a reader finds {found.read}"
    if number == len(stage.disk.operations):
        yield from _broken_promises(scenario, found) if stage.failure is None else (stage.failure,)


def _judged(laboratory: Laboratory, scenario: Scenario, stage: Stage, most: int) -> Iterator[tuple[int, list[str]]]:
    """Of every state: the number of operations before it, and what is wrong with it."""
    for number, tree in crash_states(stage.disk.operations, settled=stage.settled, most=most):
        yield number, list(_violations(scenario, stage, number, laboratory.recover(tree)))


@dataclass
class Examined:
    states: int = 0
    violations: dict[str, int] = field(default_factory=dict)  # and the number of operations each was first seen after


def _examine(laboratory: Laboratory, scenario: Scenario) -> Examined:
    examined = Examined()
    for number, violations in _judged(laboratory, scenario, _acted(scenario, laboratory.folder()), MOST_STATES):
        examined.states += 1
        for violation in violations:
            examined.violations.setdefault(violation, number)
    return examined


@pytest.fixture(scope="module", autouse=True)
def _small_change() -> Iterator[None]:
    """The protocol does not look at what is in the files; the script for DeepSpeed's users is no part of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointDirectory, "_provide_recovery_script", lambda house: None)
        patch.setattr(weights, "fp32_weights", lambda source: _first_word((source / "model_0.pt").read_bytes()))
        patch.setattr(
            weights, "pickle_into", lambda label, file: file.write(_payload(label, [WEIGHTS_FILE])[WEIGHTS_FILE])
        )
        yield


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("states")
    yield Laboratory(folder)
    shutil.rmtree(folder)  # thousands of files


@pytest.fixture(scope="module")
def examined(laboratory: Laboratory) -> Callable[[Scenario], Examined]:
    """What became of a scenario when nothing of the protocol is left out."""

    @functools.cache
    def examine(scenario: Scenario) -> Examined:
        return _examine(laboratory, scenario)

    return examine


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_after_a_power_cut_at_any_time_a_run_goes_on_from_the_old_or_the_new(
    scenario: Scenario, examined: Callable[[Scenario], Examined]
) -> None:
    assert examined(scenario).violations == {}


def test_that_was_said_of_ten_thousand_states(laboratory: Laboratory, examined: Callable[[Scenario], Examined]) -> None:
    assert sum(examined(scenario).states for scenario in SCENARIOS) >= 10_000
    assert laboratory.distinct >= 2_000


@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if len(one.roles) != 1], ids=str)  # two hold for one
def test_a_run_killed_at_any_time_and_started_again_keeps_what_it_found(
    scenario: Scenario, laboratory: Laboratory
) -> None:
    """A kill leaves what was never synced in memory: the run that finds it must not build on it as it is."""
    uncut = _acted(scenario, laboratory.folder())
    wrong: dict[str, str] = {}
    for at in range(uncut.settled, len(uncut.disk.operations) + 1):
        for violation, number in _killed(laboratory, scenario, uncut, at):
            wrong.setdefault(violation, f"killed after {at}, power cut after {number}")
    assert wrong == {}


def _killed(
    laboratory: Laboratory, scenario: Scenario, uncut: Stage, at: int, skipped: Step | None = None
) -> Iterator[tuple[str, int]]:
    stage = _restarted(laboratory, scenario, at, skipped)
    shown = _newest(_labels(scan(stage.directory)))
    assert uncut.promised is not None
    if at >= uncut.promised and shown != scenario.new:
        yield f"the new checkpoint was promised, the next run finds {shown}", at
    done = len(stage.disk.operations)
    for number, tree in crash_states(stage.disk.operations, first=at, settled=stage.settled, most=MOST_AFTER_A_KILL):
        found = laboratory.recover(tree)
        allowed = {shown} if number == done else {scenario.old, scenario.new}
        for violation in _unsafe(dataclasses.replace(scenario, readable=False), allowed, found):
            yield violation, number
        if number == done and found.read != shown:
            yield f"the start showed {shown}, a reader finds {found.read}", number


def _restarted(laboratory: Laboratory, scenario: Scenario, at: int, skipped: Step | None = None) -> Stage:
    """Killed when so many operations were done, then started again."""
    stage = _staged(scenario, laboratory.folder())
    stage.disk.dies_at = at
    with contextlib.suppress(KilledError):
        scenario.act(stage)
    stage.disk.dies_at, stage.disk.skipped = None, skipped
    CheckpointDirectory(stage.disk, stage.directory, DEFAULTS).start()
    return stage


# Each step left out, or done at another time.

HARMLESS = {  # by what a step's name ends with
    "_write_record > write_file: sync": "records are read in the life of those who wrote them, never after a power cut",
    "commit: unlink": "a record in a checkpoint is in nobody's way: the manifest does not list it",
    "discard: unlink": "what has no marker is no checkpoint; the next start deletes it",
    "_sweep_one > remove: unlink": "what is swept has no marker, or one that does not fit",
    "publish > remove: unlink": "of a best that has been beaten: a start makes it again from the one that beat it",
    "publish > remove: sync_directory": "the same; where the marker alone decides, remove is missed",
    "supersede > remove: unlink": "what it was superseded for is complete by then: a start finishes it",
    "supersede > remove: sync_directory": "the same",
    "keep_weights > publish: sync_directory": "the one before the old best goes: a start makes it again; link needs it",
    "sweep: sync_directory": "latest moves to what is found, which syncs the same names; it is for where nothing moves",
    "_sweep_one > publish: sync_directory": "the same",
    "_sweep_one: unlink": "a pointer's unfinished file is overwritten by the next; only tidiness asks for it",
}
KILLED_IN = "pruning"  # gives the next start all kinds of work


def _steps(operations: Iterable[Operation]) -> set[Step]:
    return {one.step for one in operations if one.kind in ("sync", "sync_directory", "rename", "link", "unlink")}


@pytest.fixture(scope="module")
def acted(laboratory: Laboratory) -> dict[Scenario, Stage]:
    """Every scenario as it goes."""
    return {scenario: _acted(scenario, laboratory.folder()) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def acts(acted: dict[Scenario, Stage]) -> dict[Scenario, list[Operation]]:
    """What each scenario does to the disk."""
    return {scenario: stage.disk.operations[stage.settled :] for scenario, stage in acted.items()}


@pytest.fixture(scope="module")
def starts(laboratory: Laboratory, acted: dict[Scenario, Stage]) -> list[Operation]:
    """What starts after kills do to the disk before they go on as others do."""
    scenario, kills = _kills(acted)
    done = (_restarted(laboratory, scenario, at).disk.operations[at:] for at in kills)
    return [operation for operation in itertools.chain(*done) if operation.site.startswith("sweep")]


def _kills(acted: dict[Scenario, Stage]) -> tuple[Scenario, range]:
    scenario = _scenario(KILLED_IN)
    return scenario, range(acted[scenario].settled, len(acted[scenario].disk.operations) + 1)


def test_every_step_left_out_is_missed(
    laboratory: Laboratory,
    acted: dict[Scenario, Stage],
    acts: dict[Scenario, list[Operation]],
    starts: list[Operation],
) -> None:
    steps = {step for step in set().union(*map(_steps, acts.values())) if not step[0].startswith("sweep")}
    unmissed = [step for step in steps if not _is_missed(laboratory, acts, step)]
    unmissed += [step for step in _steps(starts) if not _is_missed_after_a_kill(laboratory, acted, step)]
    assert sorted({site for site, _ in unmissed if not site.endswith(tuple(HARMLESS))}) == []
    assert [end for end in HARMLESS if not any(site.endswith(end) for site, _ in unmissed)] == []


def _is_missed(laboratory: Laboratory, acts: dict[Scenario, list[Operation]], step: Step) -> bool:
    scenarios = [scenario for scenario, operations in acts.items() if step in _steps(operations)]
    if step[0].endswith(tuple(HARMLESS)):
        scenarios = scenarios[:1]  # one tells whether the list is up to date, and the search for nothing takes longest
    return any(
        violations
        for scenario in scenarios
        for _, violations in _judged(
            laboratory, scenario, _acted(scenario, laboratory.folder(), step), MOST_OF_A_MUTANT
        )
    )


def _is_missed_after_a_kill(laboratory: Laboratory, acted: dict[Scenario, Stage], step: Step) -> bool:
    scenario, kills = _kills(acted)
    return any(any(_killed(laboratory, scenario, acted[scenario], at, step)) for at in kills)


def test_no_call_of_the_disk_was_overlooked(acts: dict[Scenario, list[Operation]], starts: list[Operation]) -> None:
    """A new line in the protocol needs a scenario in which it is reached."""
    reached = {operation.site for operation in itertools.chain(starts, *acts.values())}
    assert _disk_calls() <= {site.rpartition(" > ")[2] for site in reached}


def _disk_calls() -> set[str]:
    nodes = itertools.chain(*(ast.walk(ast.parse(inspect.getsource(module))) for module in (commit, weights)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {
        f"{function.name}: {call.func.attr}"
        for function in functions
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "disk"
    }


@dataclass(frozen=True)
class Hurry:
    """Steps that are done too early: directly before the first step of a site ``to``."""

    name: str
    scenario: str
    moved: Callable[[Operation], bool]
    to: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "hurry",
    [
        Hurry(
            "the manifest before the files",
            "first ever",
            moved=lambda one: one.site.startswith("commit > write_file"),
            to="write_with > __init__: create",
        ),
        Hurry(
            "a copied manifest before the copied files",
            "second, as epoch_00001 and best_model, copied",
            moved=lambda one: one.path == f"run/{EPOCH_TAG}{PARTIAL}/{MANIFEST}",
            to="link > _link_or_copy > write_with > __init__: create",
        ),
        Hurry(
            "latest before what it names",
            "second, as epoch_00001",
            moved=lambda one: one.site.startswith("point_to"),
            to="commit > write_file: create",
        ),
        Hurry(
            "the files deleted before the manifest",
            "pruning",
            moved=lambda one: one.site == "remove > discard: unlink",
            to="remove: unlink",
        ),
    ],
    ids=str,
)
def test_the_order_of_steps_matters(hurry: Hurry, laboratory: Laboratory, acted: dict[Scenario, Stage]) -> None:
    scenario = _scenario(hurry.scenario)
    stage = _reordered(acted[scenario], hurry)
    assert any(violations for _, violations in _judged(laboratory, scenario, stage, MOST_OF_A_MUTANT))


def _reordered(stage: Stage, hurry: Hurry) -> Stage:
    operations, settled = stage.disk.operations, stage.settled
    assert stage.promised is not None
    keeping_the_promise = operations[stage.promised - 1]
    moved = [one for one in operations[settled:] if hurry.moved(one)]
    others = [one for one in operations[settled:] if not hurry.moved(one)]
    place = next(index for index, one in enumerate(others) if one.site == hurry.to)
    changed = copy.copy(stage)
    changed.disk = copy.copy(stage.disk)
    changed.disk.operations = [*operations[:settled], *others[:place], *moved, *others[place:]]
    changed.promised = 1 + next(i for i, one in enumerate(changed.disk.operations) if one is keeping_the_promise)
    return changed


# Each call of the disk failing, under two ranks that save for real.


@dataclass(frozen=True)
class Fault:
    name: str
    error: int
    kinds: frozenset[Kind]  # that fail
    lasting: bool = False  # also all later ones

    def __str__(self) -> str:
        return self.name


_TAKING_SPACE = frozenset[Kind](("create", "write", "make_directory", "link", "rename"))
_ALL = _TAKING_SPACE | frozenset[Kind](("sync", "sync_directory", "unlink", "remove_directory"))
FAULTS = [
    Fault("no space any more", errno.ENOSPC, _TAKING_SPACE, lasting=True),
    Fault("an I/O error", errno.EIO, _ALL),
    Fault("a disk that died", errno.EIO, _ALL, lasting=True),
]


class FailingDisk(RecordingDisk):
    """Fails at its n-th call of some kinds; a write fails halfway."""

    def __init__(self, root: Path, fault: Fault, at: int) -> None:
        super().__init__(root)
        self.failed = self.repaired = False
        self._fault = fault
        self._left = at
        self._lock = threading.Lock()  # two ranks count

    def _perform(
        self, kind: Kind, action: Callable[[], T], path: Path, target: Path | None = None, data: bytes = b""
    ) -> T | None:
        if not self._fails(kind):
            return super()._perform(kind, action, path, target, data)
        if kind == "write":
            with path.open("ab") as file:
                file.write(data[: len(data) // 2])
        raise OSError(self._fault.error, os.strerror(self._fault.error))

    def _fails(self, kind: Kind) -> bool:
        with self._lock:
            if self.repaired or kind not in self._fault.kinds or (self.failed and not self._fault.lasting):
                return False
            self._left -= 1
            self.failed = self.failed or self._left < 0
            return self.failed


class _ShortWrites(io.FileIO):
    """Takes half of what it is given."""

    def write(self, data: memoryview) -> int:
        return super().write(data[: (len(data) + 1) // 2])


class ShortWritingDisk(RecordingDisk):
    """Its n-th file is one that takes less than it is given."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.created = 0
        self._at = at

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self.created += 1
        if self.created - 1 != self._at:
            return file
        file.close()
        return _ShortWrites(path, "wb")


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(RANKS) as pool:
        yield pool


def _save(disk: Disk, house: CheckpointDirectory, directory: Path, step: int, rank: int, roles: Sequence[str]) -> Save:
    return Save(
        disk,
        directory,
        rolling_tag(step),
        rank,
        RANKS,
        contents={f"{rank}.pt": {"step": step, "rank": rank}},
        memory=None,
        ready=None,
        bytes_per_second=0.0,
        manifest=lambda files: _manifest(step, files, roles),
        afterwards=lambda tag: house.after_commit(tag, roles),
    )


def _saved(
    ranks: ThreadPoolExecutor,
    disk: Disk,
    house: CheckpointDirectory,
    directory: Path,
    step: int,
    roles: Sequence[str] = (),
) -> bool:
    """Whether two ranks commit; they agree on failures as those of a run do."""
    saves = [_save(disk, house, directory, step, rank, roles) for rank in range(RANKS)]
    running = [ranks.submit(save.run) for save in saves]
    for save in saves:
        assert save.files_done.wait(30)
    if not all(save.wrote for save in saves):
        for save in saves:
            save.aborted.set()
    for one in running:
        one.result(30)
    return saves[0].committed


def _good_tags(directory: Path) -> set[str]:
    return {found.tag for found in scan(directory) if catalog.problem_of(found) is None}


@pytest.mark.parametrize("before", ["second, as best_model", "the same step again", "the same step again, evaluated"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_failing_disk_costs_one_checkpoint_at_most(
    fault: Fault,
    before: str,
    ranks: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writer, "_POLL_SECONDS", 0.001)
    if before != "second, as best_model":  # what PyTorch makes of a failing file is seen before the other one
        monkeypatch.setattr(writer, "pickle_into", lambda content, file: file.write(repr(content).encode()))
    for at in itertools.count():
        root = tmp_path / str(at)
        caplog.clear()
        disk = _failing_while_saving(_scenario(before), root, fault, at, ranks)
        assert disk.failed == any(record.levelno >= logging.WARNING for record in caplog.records)
        shutil.rmtree(root)
        if not disk.failed:
            break
    assert at > 25


def _failing_while_saving(
    scenario: Scenario, root: Path, fault: Fault, at: int, ranks: ThreadPoolExecutor
) -> FailingDisk:
    directory = _staged(scenario, root).directory
    (old,) = (found.tag for found in scan(directory) if found.role == "rolling")
    disk = FailingDisk(root, fault, at)
    house = CheckpointDirectory(disk, directory, DEFAULTS)
    committed = _saved(ranks, disk, house, directory, 10, [EPOCH_TAG, BEST_TAG])
    assert not committed or rolling_tag(10) in _good_tags(directory)
    replaced = scenario.replaces and commit.has_unfinished_commit(directory)
    assert replaced or {old, superseded_tag(10)} & _good_tags(directory)
    disk.repaired = True
    assert _saved(ranks, disk, house, directory, 15)
    assert _latest(directory) == rolling_tag(15)
    CheckpointDirectory(disk, directory, DEFAULTS).start()
    best = {BEST_TAG} if committed or scenario.best is not None else set()
    assert {old, rolling_tag(15), *best} <= _good_tags(directory)
    assert _good_tags(directory) == {found.tag for found in scan(directory)}
    assert not list(directory.glob("*" + PARTIAL))
    if scenario.best is not None:
        assert manifest.read(directory / BEST_TAG).val_loss <= scenario.best
    return disk


def test_a_file_that_takes_less_than_it_is_given_gets_the_rest(ranks: ThreadPoolExecutor, tmp_path: Path) -> None:
    for at in itertools.count():
        directory = tmp_path / str(at) / "run"
        directory.mkdir(parents=True)
        disk = ShortWritingDisk(directory.parent, at)
        house = CheckpointDirectory(disk, directory, DEFAULTS)
        assert _saved(ranks, disk, house, directory, 10, [BEST_TAG])
        assert _good_tags(directory) == {rolling_tag(10), BEST_TAG}
        assert _latest(directory) == rolling_tag(10)
        assert torch.load(directory / BEST_TAG / "1.pt") == {"step": 10, "rank": 1}
        if disk.created <= at:
            break
    assert at >= 6  # two files, two records, a manifest, a pointer


def test_rank_0_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "_PATIENCE_SECONDS", 0.05)
    disk = RecordingDisk(tmp_path)
    house = CheckpointDirectory(disk, tmp_path, DEFAULTS)
    save = _save(disk, house, tmp_path, 10, 0, [])
    save.run()
    assert not save.committed
    assert "rank 1 has not written its files" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_unevaluated_checkpoint_of_another_state_is_superseded(tmp_path: Path) -> None:
    """As one of another history that is taken in, or fetched from a backup."""
    stage = Stage(tmp_path, RecordingDisk(tmp_path), DEFAULTS)
    for directory in (stage.directory, stage.elsewhere):
        stage.disk.make_directory(directory)
    stage.save(10, "old", evaluated=False)
    files = _write_parts(stage.disk, stage.elsewhere / (rolling_tag(10) + PARTIAL), "new")
    other = _manifest(10, files)
    other.state["ledger"] = "of another history"
    commit.commit(stage.disk, stage.elsewhere, rolling_tag(10), other)
    stage.resume(stage.elsewhere / rolling_tag(10))
    assert [label for _, label in _labels(scan(stage.directory))] == ["new", "old"]


def test_a_start_finishes_a_commit_though_the_checkpoint_it_replaces_is_there_and_damaged(tmp_path: Path) -> None:
    stage = Stage(tmp_path, RecordingDisk(tmp_path), DEFAULTS)
    stage.disk.make_directory(stage.directory)
    stage.save(10, "new")
    new, partial = stage.directory / rolling_tag(10), stage.directory / (rolling_tag(10) + PARTIAL)
    new.rename(partial)
    stage.save(5, "before")
    shutil.copytree(partial, new)
    (new / "optim_0.pt").unlink()
    stage.start()
    found = {one.tag: catalog.problem_of(one) for one in scan(stage.directory)}
    assert found[rolling_tag(10)] is None and found[superseded_tag(10)] == "optim_0.pt is missing"


def test_what_cannot_be_read_back_ends_no_run(
    ranks: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(checkpoint: Path) -> Manifest:
        raise DamagedError(f"{MANIFEST} cannot be read: Input/output error")

    disk = RecordingDisk(tmp_path)
    house = CheckpointDirectory(disk, tmp_path, DEFAULTS)
    monkeypatch.setattr(commit, "read", unreadable)
    assert _saved(ranks, disk, house, tmp_path, 10, [BEST_TAG])
    assert "Input/output error" in caplog.text
