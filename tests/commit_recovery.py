"""Simulate power failures and kills in the scenarios of the commit protocol, recover, and verify the result."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from commit_scenarios import DEFAULTS, Scenario, Stage, file_contents, perform, prepare
from crash_states import Tree, crash_states, materialize
from disks import KilledError, RecordingDisk, Step

from ds_gpt2.checkpoint import catalog
from ds_gpt2.checkpoint.catalog import Generation, scan
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.naming import LATEST, MANIFEST, PARTIAL, role_of
from ds_gpt2.checkpoint.weights import WEIGHTS_FILE

MAX_STATES = 260  # per number of operations
MAX_STATES_AFTER_KILL = 12
INVALID_CONTENT = "content that was never written"


@dataclass(frozen=True)
class Recovery:
    """What is found after a power failure: by a reader before the next start, and by a run after its start."""

    newest_before: str | None  # before the start: the label of the newest intact checkpoint
    tags_before: frozenset[tuple[str, str]]  # before the start: (tag, label) of all intact checkpoints
    latest_before: str | None  # before the start: the content of ``latest``
    dangling_before: bool  # before the start: whether ``latest`` names no checkpoint
    newest: str | None  # the label of the newest intact checkpoint
    labels: frozenset[str]  # of all intact full checkpoints, also superseded ones
    damaged: tuple[str, ...]  # the tags of committed checkpoints that are damaged
    best: float | None  # the validation loss of the best checkpoint
    latest: str | None  # the content of ``latest``
    dangling: bool  # whether ``latest`` names no checkpoint
    partial: tuple[str, ...]  # remaining partial checkpoints


def _recover(tree: Tree, root: Path) -> Recovery:
    materialize(tree, root)
    directory, disk = root / "run", RecordingDisk(root)
    listed = scan(directory)
    before, latest_before, dangling_before = intact(listed), latest_of(directory), _is_dangling(directory)
    CheckpointDirectory(disk, directory, DEFAULTS).start()
    if disk.operations:
        listed = scan(directory)
    after = intact(listed)
    best = [found.manifest.val_loss for found in listed if found.role == "best" and found.manifest]
    return Recovery(
        newest_before=newest_label(before),
        tags_before=frozenset((found.tag, label) for found, label in before),
        latest_before=latest_before,
        dangling_before=dangling_before,
        newest=newest_label(after),
        labels=frozenset(label for found, label in after if not found.weights_only),
        damaged=tuple({found.tag for found in listed} - {found.tag for found, _ in after}),
        best=best[0] if best else None,
        latest=latest_of(directory),
        dangling=_is_dangling(directory),
        partial=tuple(path.name for path in directory.glob("*" + PARTIAL)),
    )


def intact(listed: Iterable[Generation]) -> list[tuple[Generation, str]]:
    """Return the intact checkpoints, in the same order, each with its label."""
    return [(found, _label(found)) for found in listed if catalog.problem_of(found) is None]


def _label(found: Generation) -> str:
    assert found.manifest is not None
    content = {name: (found.path / name).read_bytes() for name in found.manifest.files}
    label = first_word(next(iter(content.values())))
    expected = file_contents(label, [WEIGHTS_FILE]) if found.weights_only else file_contents(label)
    return label if content == expected else INVALID_CONTENT


def first_word(content: bytes) -> str:
    """Return the label in a file of a checkpoint."""
    return content.decode().split()[0]


def newest_label(found: Iterable[tuple[Generation, str]]) -> str | None:
    """Return the label of the checkpoint that a run would resume from."""
    return next(
        (label for generation, label in found if not (generation.role == "superseded" or generation.weights_only)), None
    )


def latest_of(directory: Path) -> str | None:
    """Return the content of ``latest``; None if it does not exist."""
    path = directory / LATEST
    return path.read_bytes().decode(errors="replace") if path.exists() else None


def _is_dangling(directory: Path) -> bool:
    """Return whether ``latest`` names no checkpoint, so that DeepSpeed's tools would fail."""
    latest = latest_of(directory)
    return latest is not None and (role_of(latest) is None or not (directory / latest / MANIFEST).exists())


class RecoveryCache:
    """Recovers from states after power failures; the result for equal states is cached."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = itertools.count()
        self._results: dict[Tree, Recovery] = {}

    def folder(self) -> Path:
        """Return a new path."""
        return self._folder / str(next(self._folders))

    def recover(self, tree: Tree) -> Recovery:
        """Write ``tree`` to a directory, start a run there, and return what it finds."""
        if tree not in self._results:
            self._results[tree] = _recover(tree, self._folder / "state")
        return self._results[tree]

    @property
    def distinct(self) -> int:
        """The number of different states."""
        return len(self._results)


def _unsafe(scenario: Scenario, allowed: set[str | None], found: Recovery) -> Iterator[str]:
    """Yield violations of what must hold at any time. ``allowed``: the labels from which a run may resume."""
    if found.newest not in allowed:
        yield f"a run would resume from {found.newest}"
    if scenario.old not in {None, *found.labels} and not (scenario.replaces and scenario.new in found.labels):
        yield f"{scenario.old}, which the user may need, is lost"
    if found.damaged:
        yield f"{found.damaged} are damaged checkpoints"
    if found.dangling:
        yield f"latest names {found.latest!r}, which is not a checkpoint"
    if scenario.best is not None and (found.best is None or found.best > scenario.best):
        yield f"the best loss was {scenario.best}, it is {found.best}"
    if found.partial:
        yield f"{found.partial} remain"
    if scenario.readable and (found.newest_before not in allowed or found.dangling_before):
        state = "dangling" if found.dangling_before else "valid"
        yield f"a reader finds {found.newest_before}, and latest is {state}"


def _broken_promises(scenario: Scenario, found: Recovery) -> Iterator[str]:
    """Yield violations of what must hold after the action has returned."""
    if found.latest_before != scenario.latest:
        yield f"latest should name {scenario.latest}, it names {found.latest_before}"
    for role in scenario.roles:
        if (role, scenario.new) not in found.tags_before:
            yield f"{role} was saved, but does not exist"


def _violations(scenario: Scenario, stage: Stage, number: int, found: Recovery) -> Iterator[str]:
    """Yield the violations in a state after ``number`` operations."""
    promised = stage.promised is not None and number >= stage.promised
    yield from _unsafe(scenario, {scenario.new} if promised else {scenario.old, scenario.new}, found)
    if promised and found.newest_before != scenario.new:
        yield f"the new checkpoint must exist, but a reader finds {found.newest_before}"
    if number == len(stage.disk.operations):
        yield from _broken_promises(scenario, found) if stage.failure is None else (stage.failure,)


def violations_per_state(
    recoveries: RecoveryCache, scenario: Scenario, stage: Stage, most: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of operations, violations) for every state.

    Args:
        most: the limit of states per number of operations.
    """
    for number, tree in crash_states(stage.disk.operations, settled=stage.settled, most=most):
        yield number, list(_violations(scenario, stage, number, recoveries.recover(tree)))


@dataclass
class Examined:
    """The result of the examination of a scenario."""

    states: int = 0
    violations: dict[str, int] = field(default_factory=dict)  # violation -> number of operations before the first


def examine(recoveries: RecoveryCache, scenario: Scenario) -> Examined:
    """Perform ``scenario`` and verify the states after a power failure at any time."""
    examined = Examined()
    for number, violations in violations_per_state(
        recoveries, scenario, perform(scenario, recoveries.folder()), MAX_STATES
    ):
        examined.states += 1
        for violation in violations:
            examined.violations.setdefault(violation, number)
    return examined


def violations_after_kill(
    recoveries: RecoveryCache, scenario: Scenario, uncut: Stage, at: int, skipped: Step | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (violation, number of operations) for a kill after ``at`` operations and a restart.

    A kill does not lose what is in the write cache: the restarted run must make it durable before it relies on it. So a
    power failure is simulated at any time after the kill.

    Args:
        uncut: the stage of the scenario without a kill.
        skipped: a call of the disk that the restarted run does not perform.
    """
    stage = restart(recoveries, scenario, at, skipped)
    shown = newest_label(intact(scan(stage.directory)))
    assert uncut.promised is not None
    if at >= uncut.promised and shown != scenario.new:
        yield f"the new checkpoint must exist, but the next run finds {shown}", at
    done = len(stage.disk.operations)
    for number, tree in crash_states(
        stage.disk.operations, first=at, settled=stage.settled, most=MAX_STATES_AFTER_KILL
    ):
        found = recoveries.recover(tree)
        allowed = {shown} if number == done else {scenario.old, scenario.new}
        for violation in _unsafe(dataclasses.replace(scenario, readable=False), allowed, found):
            yield violation, number
        if number == done and found.newest_before != shown:
            yield f"the start found {shown}, but a reader finds {found.newest_before}", number


def restart(recoveries: RecoveryCache, scenario: Scenario, at: int, skipped: Step | None = None) -> Stage:
    """Return a stage whose process was killed after ``at`` operations and started again."""
    stage = prepare(scenario, recoveries.folder())
    stage.disk.dies_at = at
    with contextlib.suppress(KilledError):
        scenario.act(stage)
    stage.disk.dies_at, stage.disk.skipped = None, skipped
    CheckpointDirectory(stage.disk, stage.directory, DEFAULTS).start()
    return stage
