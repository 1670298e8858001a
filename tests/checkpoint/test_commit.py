"""Prove the commit protocol: power failures and kills at any time, each step left out, each disk operation failing.

A scenario is performed once and its file operations are recorded. ``crash_states`` computes what a power failure may
leave of them; each such state is written to a real disk and recovered from, as a restarted run does.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commit_recovery import (
    Examined,
    RecoveryCache,
    examine,
    first_word,
    intact,
    latest_of,
    restart,
    violations_after_kill,
    violations_per_state,
)
from commit_scenarios import (
    DEFAULTS,
    EPOCH_TAG,
    RANKS,
    SCENARIOS,
    Scenario,
    Stage,
    file_contents,
    manifest_of,
    perform,
    prepare,
    scenario_named,
    write_parts,
)
from disks import FAULTS, FailingDisk, Fault, Operation, RecordingDisk, ShortWritingDisk, Step

from ds_gpt2.checkpoint import catalog, commit, manifest, weights
from ds_gpt2.checkpoint import save as writer
from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, MANIFEST, PARTIAL, rolling_tag, superseded_tag
from ds_gpt2.checkpoint.save import Save
from ds_gpt2.checkpoint.weights import WEIGHTS_FILE

MAX_STATES_OF_MUTANT = 20  # per number of operations


@pytest.fixture(scope="module", autouse=True)
def _simple_weights() -> Iterator[None]:
    """Replace the content of weights files and leave out the recovery script: the protocol depends on neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointDirectory, "_provide_recovery_script", lambda checkpoints: None)
        patch.setattr(weights, "fp32_weights", lambda source, kind: first_word((source / "model_0.pt").read_bytes()))
        patch.setattr(
            weights, "pickle_into", lambda label, file: file.write(file_contents(label, [WEIGHTS_FILE])[WEIGHTS_FILE])
        )
        yield


@pytest.fixture(scope="module", autouse=True)
def _decoded_once() -> Iterator[None]:
    """Decode equal manifests once: they are read a hundred thousand times, and decoding has no side effects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "decode", functools.cache(manifest.decode))
        yield


@pytest.fixture(scope="module")
def recoveries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryCache]:
    folder = tmp_path_factory.mktemp("states")
    yield RecoveryCache(folder)
    shutil.rmtree(folder)  # it contains thousands of files


@pytest.fixture(scope="module")
def examined(recoveries: RecoveryCache) -> Callable[[Scenario], Examined]:
    """Return a function that examines a scenario under the complete protocol; results are cached."""

    @functools.cache
    def examine_once(scenario: Scenario) -> Examined:
        return examine(recoveries, scenario)

    return examine_once


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_after_a_power_failure_at_any_time_a_run_resumes_from_the_old_or_the_new_checkpoint(
    scenario: Scenario, examined: Callable[[Scenario], Examined]
) -> None:
    assert examined(scenario).violations == {}


def test_at_least_ten_thousand_states_are_examined(
    recoveries: RecoveryCache, examined: Callable[[Scenario], Examined]
) -> None:
    assert sum(examined(scenario).states for scenario in SCENARIOS) >= 10_000
    assert recoveries.distinct >= 2_000


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [scenario for scenario in SCENARIOS if len(scenario.roles) != 1], ids=str)
def test_a_run_killed_at_any_time_and_started_again_retains_the_checkpoint_it_resumes_from(
    scenario: Scenario, recoveries: RecoveryCache
) -> None:
    """Scenarios with one role are left out: those with two roles cover them."""
    uncut = perform(scenario, recoveries.folder())
    violations: dict[str, str] = {}
    for at in range(uncut.settled, len(uncut.disk.operations) + 1):
        for violation, number in violations_after_kill(recoveries, scenario, uncut, at):
            violations.setdefault(violation, f"killed after {at}, power failure after {number}")
    assert violations == {}


# Each step left out, or performed at another time.

HARMLESS = {  # steps that may be left out, by the end of their names, and why
    "_write_record > write_file: sync": "records are read only while their writers run, never after a power failure",
    "commit: unlink": "a record that remains in a checkpoint has no effect: the manifest does not list it",
    "discard: unlink": "a directory without a manifest is not a checkpoint; the next start deletes it",
    "_sweep_one > remove: unlink": "the deleted directory has no valid manifest",
    "publish > remove: unlink": "the old best checkpoint: a start creates the new one again from the better checkpoint",
    "publish > remove: sync_directory": "the same; in other scenarios this step of remove is required",
    "supersede > remove: unlink": "the checkpoint that replaces it is complete by then: a start finishes the commit",
    "supersede > remove: sync_directory": "the same",
    "save_weights > publish: sync_directory": "a start creates the best checkpoint again; link requires it",
    "sweep: sync_directory": "the update of latest syncs the same directory; it is required if latest is not updated",
    "_sweep_one > publish: sync_directory": "the same",
    "replace_manifest: sync_directory": "a start without the evaluation repeats it; its roles are durable themselves",
    "_sweep_one: unlink": "the temporary file of a pointer is overwritten by the next update",
}
KILLED_IN = "pruning"  # the next start has all kinds of work after a kill in this scenario


def _steps(operations: Iterable[Operation]) -> set[Step]:
    return {
        operation.step
        for operation in operations
        if operation.kind in ("sync", "sync_directory", "rename", "link", "unlink")
    }


@pytest.fixture(scope="module")
def stages(recoveries: RecoveryCache) -> dict[Scenario, Stage]:
    """The stages of all scenarios after their actions."""
    return {scenario: perform(scenario, recoveries.folder()) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def actions(stages: dict[Scenario, Stage]) -> dict[Scenario, list[Operation]]:
    """The disk operations of the action of each scenario."""
    return {scenario: stage.disk.operations[stage.settled :] for scenario, stage in stages.items()}


@pytest.fixture(scope="module")
def starts(recoveries: RecoveryCache, stages: dict[Scenario, Stage]) -> list[Operation]:
    """The disk operations with which starts after kills clean up."""
    scenario, kills = _kills(stages)
    after_kill = (restart(recoveries, scenario, at).disk.operations[at:] for at in kills)
    return [operation for operation in itertools.chain(*after_kill) if operation.site.startswith("sweep")]


def _kills(stages: dict[Scenario, Stage]) -> tuple[Scenario, range]:
    scenario = scenario_named(KILLED_IN)
    return scenario, range(stages[scenario].settled, len(stages[scenario].disk.operations) + 1)


@pytest.mark.slow
def test_every_step_of_the_protocol_is_required(
    recoveries: RecoveryCache,
    stages: dict[Scenario, Stage],
    actions: dict[Scenario, list[Operation]],
    starts: list[Operation],
) -> None:
    steps = {step for step in set().union(*map(_steps, actions.values())) if not step[0].startswith("sweep")}
    unneeded = [step for step in steps if not _is_required(recoveries, actions, step)]
    unneeded += [step for step in _steps(starts) if not _is_required_after_a_kill(recoveries, stages, step)]
    assert sorted({site for site, _ in unneeded if not site.endswith(tuple(HARMLESS))}) == []
    assert [end for end in HARMLESS if not any(site.endswith(end) for site, _ in unneeded)] == []


def _is_required(recoveries: RecoveryCache, actions: dict[Scenario, list[Operation]], step: Step) -> bool:
    scenarios = [scenario for scenario, operations in actions.items() if step in _steps(operations)]
    if step[0].endswith(tuple(HARMLESS)):
        scenarios = scenarios[:1]  # one suffices to check the list, and a search without a result takes longest
    return any(
        violations
        for scenario in scenarios
        for _, violations in violations_per_state(
            recoveries, scenario, perform(scenario, recoveries.folder(), step), MAX_STATES_OF_MUTANT
        )
    )


def _is_required_after_a_kill(recoveries: RecoveryCache, stages: dict[Scenario, Stage], step: Step) -> bool:
    scenario, kills = _kills(stages)
    return any(any(violations_after_kill(recoveries, scenario, stages[scenario], at, step)) for at in kills)


def test_the_scenarios_reach_every_call_of_the_disk(
    actions: dict[Scenario, list[Operation]], starts: list[Operation]
) -> None:
    """A new line in the protocol requires a scenario that reaches it."""
    reached = {operation.site for operation in itertools.chain(starts, *actions.values())}
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
class Reordering:
    """Steps that are performed too early: directly before the first step of the site ``to``."""

    name: str
    scenario: str
    moved: Callable[[Operation], bool]
    to: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "reordering",
    [
        Reordering(
            "the manifest before the files",
            "first checkpoint",
            moved=lambda operation: operation.site.startswith("commit > write_file"),
            to="write_with > __init__: create",
        ),
        Reordering(
            "a copied manifest before the copied files",
            "second, as epoch_00001 and best_model, copied",
            moved=lambda operation: operation.path == f"run/{EPOCH_TAG}{PARTIAL}/{MANIFEST}",
            to="link > _link_or_copy > write_with > __init__: create",
        ),
        Reordering(
            "latest before the checkpoint that it names",
            "second, as epoch_00001",
            moved=lambda operation: operation.site.startswith("point_to"),
            to="commit > write_file: create",
        ),
        Reordering(
            "the files deleted before the manifest",
            "pruning",
            moved=lambda operation: operation.site == "remove > discard: unlink",
            to="remove: unlink",
        ),
    ],
    ids=str,
)
def test_the_order_of_steps_matters(
    reordering: Reordering, recoveries: RecoveryCache, stages: dict[Scenario, Stage]
) -> None:
    scenario = scenario_named(reordering.scenario)
    stage = _reordered(stages[scenario], reordering)
    assert any(violations for _, violations in violations_per_state(recoveries, scenario, stage, MAX_STATES_OF_MUTANT))


def _reordered(stage: Stage, reordering: Reordering) -> Stage:
    operations, settled = stage.disk.operations, stage.settled
    assert stage.promised is not None
    last_promised = operations[stage.promised - 1]
    moved = [operation for operation in operations[settled:] if reordering.moved(operation)]
    others = [operation for operation in operations[settled:] if not reordering.moved(operation)]
    index = next(index for index, operation in enumerate(others) if operation.site == reordering.to)
    changed = copy.copy(stage)
    changed.disk = copy.copy(stage.disk)
    changed.disk.operations = [*operations[:settled], *others[:index], *moved, *others[index:]]
    changed.promised = 1 + next(i for i, operation in enumerate(changed.disk.operations) if operation is last_promised)
    return changed


# Each disk operation fails while two ranks save.


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(RANKS) as pool:
        yield pool


def _save(
    disk: Disk, checkpoints: CheckpointDirectory, directory: Path, step: int, rank: int, roles: Sequence[str]
) -> Save:
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
        manifest=lambda files: manifest_of(step, files, roles),
        afterwards=lambda tag: checkpoints.after_commit(tag, roles),
    )


def _saved(
    ranks: ThreadPoolExecutor,
    disk: Disk,
    checkpoints: CheckpointDirectory,
    directory: Path,
    step: int,
    roles: Sequence[str] = (),
) -> bool:
    """Save on two ranks and return whether the checkpoint is committed. The ranks agree on failures as in a run."""
    saves = [_save(disk, checkpoints, directory, step, rank, roles) for rank in range(RANKS)]
    running = [ranks.submit(save.run) for save in saves]
    for save in saves:
        assert save.files_done.wait(30)
    if not all(save.wrote for save in saves):
        for save in saves:
            save.aborted.set()
    for future in running:
        future.result(30)
    return saves[0].committed


def _good_tags(directory: Path) -> set[str]:
    return {found.tag for found in scan(directory) if catalog.problem_of(found) is None}


@pytest.mark.slow
@pytest.mark.parametrize("before", ["second, as best_model", "the same step again", "the same step again, evaluated"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_failing_disk_costs_at_most_one_checkpoint(
    fault: Fault,
    before: str,
    ranks: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writer, "_POLL_SECONDS", 0.001)
    if before != "second, as best_model":  # PyTorch's reaction to a failing file is covered by the first scenario
        monkeypatch.setattr(writer, "pickle_into", lambda content, file: file.write(repr(content).encode()))
    for at in itertools.count():
        root = tmp_path / str(at)
        caplog.clear()
        disk = _save_to_failing_disk(scenario_named(before), root, fault, at, ranks)
        assert disk.failed == any(record.levelno >= logging.WARNING for record in caplog.records)
        shutil.rmtree(root)
        if not disk.failed:
            break
    assert at > 25


def _save_to_failing_disk(
    scenario: Scenario, root: Path, fault: Fault, at: int, ranks: ThreadPoolExecutor
) -> FailingDisk:
    directory = prepare(scenario, root).directory
    (old,) = (found.tag for found in scan(directory) if found.role == "rolling")
    disk = FailingDisk(root, at, fault)
    checkpoints = CheckpointDirectory(disk, directory, DEFAULTS)
    committed = _saved(ranks, disk, checkpoints, directory, 10, [EPOCH_TAG, BEST_TAG])
    assert not committed or rolling_tag(10) in _good_tags(directory)
    replaced = scenario.replaces and commit.has_unfinished_commit(directory)
    assert replaced or {old, superseded_tag(10)} & _good_tags(directory)
    disk.repaired = True
    assert _saved(ranks, disk, checkpoints, directory, 15)
    assert latest_of(directory) == rolling_tag(15)
    CheckpointDirectory(disk, directory, DEFAULTS).start()
    best = {BEST_TAG} if committed or scenario.best is not None else set()
    assert {old, rolling_tag(15), *best} <= _good_tags(directory)
    assert _good_tags(directory) == {found.tag for found in scan(directory)}
    assert not list(directory.glob("*" + PARTIAL))
    if scenario.best is not None:
        val_loss = manifest.read(directory / BEST_TAG).val_loss
        assert val_loss is not None and val_loss <= scenario.best
    return disk


def test_short_writes_are_continued(ranks: ThreadPoolExecutor, tmp_path: Path) -> None:
    for at in itertools.count():
        directory = tmp_path / str(at) / "run"
        directory.mkdir(parents=True)
        disk = ShortWritingDisk(directory.parent, at)
        checkpoints = CheckpointDirectory(disk, directory, DEFAULTS)
        assert _saved(ranks, disk, checkpoints, directory, 10, [BEST_TAG])
        assert _good_tags(directory) == {rolling_tag(10), BEST_TAG}
        assert latest_of(directory) == rolling_tag(10)
        assert torch.load(directory / BEST_TAG / "1.pt") == {"step": 10, "rank": 1}
        if disk.created <= at:
            break
    assert at >= 6  # two files, two records, a manifest, a pointer


def test_rank_0_does_not_wait_forever_for_another_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "_TIMEOUT_SECONDS", 0.05)
    disk = RecordingDisk(tmp_path)
    checkpoints = CheckpointDirectory(disk, tmp_path, DEFAULTS)
    save = _save(disk, checkpoints, tmp_path, 10, 0, [])
    save.run()
    assert not save.committed
    assert "rank 1 has not written its files" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_unevaluated_checkpoint_of_another_state_is_superseded(tmp_path: Path) -> None:
    """For example one of another history that is imported, or fetched from a backup."""
    stage = Stage(tmp_path, RecordingDisk(tmp_path), DEFAULTS)
    for directory in (stage.directory, stage.other_directory):
        stage.disk.make_directory(directory)
    stage.save(10, "old", evaluated=False)
    files = write_parts(stage.disk, stage.other_directory / (rolling_tag(10) + PARTIAL), "new")
    other = manifest_of(10, files)
    other.state["ledger"] = "of another history"
    commit.commit(stage.disk, stage.other_directory, rolling_tag(10), other)
    stage.resume(stage.other_directory / rolling_tag(10))
    assert [label for _, label in intact(scan(stage.directory))] == ["new", "old"]


def test_a_start_finishes_a_commit_that_replaces_a_damaged_checkpoint(tmp_path: Path) -> None:
    stage = Stage(tmp_path, RecordingDisk(tmp_path), DEFAULTS)
    stage.disk.make_directory(stage.directory)
    stage.save(10, "new")
    new, partial = stage.directory / rolling_tag(10), stage.directory / (rolling_tag(10) + PARTIAL)
    new.rename(partial)
    stage.save(5, "before")
    shutil.copytree(partial, new)
    (new / "optim_0.pt").unlink()
    stage.start()
    found = {generation.tag: catalog.problem_of(generation) for generation in scan(stage.directory)}
    assert found[rolling_tag(10)] is None and found[superseded_tag(10)] == "optim_0.pt is missing"


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_back_does_not_end_the_run(
    ranks: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(checkpoint: Path) -> Manifest:
        raise DamagedError(f"{MANIFEST} cannot be read: Input/output error")

    disk = RecordingDisk(tmp_path)
    checkpoints = CheckpointDirectory(disk, tmp_path, DEFAULTS)
    monkeypatch.setattr(commit, "read", unreadable)
    assert _saved(ranks, disk, checkpoints, tmp_path, 10, [BEST_TAG])
    assert "Input/output error" in caplog.text
