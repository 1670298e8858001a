"""Forks: what is refused before anything is written, and what is created; with checkpoints that were never trained."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import FILES, SIZE, write_checkpoint
from disks import KilledError, RecordingDisk
from file_tree import tree

from ds_gpt2 import cli
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.commit import has_unfinished_commit, read_pointer
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import read
from ds_gpt2.checkpoint.naming import LATEST, LOCK, MANIFEST, rolling_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.locks import lock
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import BatchPlan, plan_batch
from ds_gpt2.config.output_owner import read_owner
from ds_gpt2.config.run_location import CONFIG, public_tree, write_settings
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.fork_record import FORK, Ancestor, Fork, read_fork, write_fork
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.run_dir.starts import append_start
from ds_gpt2.supervision import launches
from ds_gpt2.training import fork
from ds_gpt2.training.fork import PlannedFork, create, find_parent, is_begun, is_complete, plan_fork
from ds_gpt2.training.preflight import check_start
from ds_gpt2.training.resume_choice import CheckpointsGoneError
from ds_gpt2.training.run_identity import data_of, identity_of

STEPS = (4, 8, 12)


@dataclasses.dataclass
class Base:
    """A parent ``base`` with checkpoints of ``STEPS``, and the settings file of both runs."""

    folder: Path
    config: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "base"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "base"

    def settings(self, name: str = "new", **overrides: str) -> Settings:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_settings(self.config, {"run.name": name, **dotted})

    def plan(self, tag: str = "latest", name: str = "new", **overrides: str) -> PlannedFork:
        settings = self.settings(name, **overrides)
        return plan_fork(settings, batch_plan(settings), find_parent(f"{self.run_dir}:{tag}", settings))


def batch_plan(settings: Settings) -> BatchPlan:
    batch = settings.batch
    return plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, 4)


@pytest.fixture
def base(tmp_path: Path, write_config: Callable[..., Path]) -> Base:
    made = Base(tmp_path, write_config(tmp_path, schedule={"steps": 16, "warmup_steps": 3}))
    settings = made.settings("base")
    settings.run_dir.mkdir(parents=True)
    write_settings(settings)
    Journal(settings.run_dir).write("start", "started", 0)
    known = {"identity": identity_of(settings, data_of(settings, [])), "settings": public_tree(settings)}
    for step in STEPS:
        state = TrainState(step=step, batch=step, val_loss=5.0, val_step=4, best_val_loss=5.0, best_step=4)
        write_checkpoint(made.checkpoints, rolling_tag(step), step, state=state.to_dict(), **known)
    return made


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], base: Base) -> Callable[..., str]:
    """Return a function that runs ``train --fork``, checks that it writes nothing, and returns its error line."""

    def run(source: str, *words: str) -> str:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setattr(launches, "Ranks", None)  # starting ranks would fail
        before = tree(base.folder)
        capfd.readouterr()
        command = ["train", str(base.config), "--fork", source.replace("BASE", str(base.run_dir)), "--num_gpus", "4"]
        assert cli.main([*command, *words]) == exit_codes.MISTAKE
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert tree(base.folder) == before
        return err

    return run


def damage(checkpoint: Path) -> None:
    """Change a byte of a file; its size stays the same."""
    file = next(path for path in checkpoint.iterdir() if path.name != MANIFEST)
    file.write_bytes(b"?" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("BASE:8", ["--fork", "BASE:4"], "--fork is given twice, as "),
        ("BASE", ["run.name=base"], "has the name of its parent, base: add run.name=NEW"),
        ("BASE:", [], "must be RUN or RUN:TAG"),
        (":8", [], "must be RUN or RUN:TAG"),
        ("nowhere:8", [], "no run nowhere; runs in "),
        ("BASE:9", [], "no checkpoint '9' in "),
        ("BASE:best", [], "no checkpoint 'best' in "),
        ("BASE:before:4", [], "cannot fork base: it has no full checkpoint before step 4 in "),
        (
            "BASE",
            ["model.layers=3"],
            "cannot fork base from rolling_step_000012: it was made with model.layers 2",
        ),
        ("BASE", ["run.seed=7"], "run.seed 1337 (this run has 7): a fork needs the same"),
        ("BASE", ["batch.tokens_per_step=2048"], "batch.tokens_per_step 1024 (this run has 2048)"),
        ("BASE", ["data.dir=/nowhere"], "no data: /nowhere does not exist"),
        (
            "BASE",
            ["schedule.steps=12"],
            "step 12 is the last step of run new: increase schedule.steps, or fork",
        ),
        ("BASE:8", ["schedule.steps=7"], "step 8 is beyond the 7 steps of run new: increase schedule.steps"),
        (
            "BASE",
            ["checkpoint.dir=BASE/x"],
            "would write to BASE/x/new, in a directory of run base: set",
        ),
        ("BASE", ["checkpoint.min_free_gb=1e9"], "GB must remain free (checkpoint.min_free_gb): free some space"),
        ("BASE", ["checkpoint.backup.to=/dev/null"], "checkpoint.backup.to: cannot back up to /dev/null"),
        ("BASE", ["run.dir=/proc/x"], "cannot write to /proc/x/new"),
    ],
)
def test_an_impossible_fork_is_refused_in_one_line_and_writes_nothing(
    refused: Callable[..., str], base: Base, source: str, words: list[str], message: str
) -> None:
    words = ["run.name=new", *words] if "run.name=base" not in words else words
    found = refused(source, *(word.replace("BASE", str(base.run_dir)) for word in words))
    assert message.replace("BASE", str(base.run_dir)) in found


def test_a_checkpoint_of_weights_and_one_of_another_run_are_refused(refused: Callable[..., str], base: Base) -> None:
    write_checkpoint(base.checkpoints, "best_model", 8, kind="weights")
    assert f"./launch.sh export {base.run_dir} --tag best_model`, then train with model.init_from" in refused(
        "BASE:best", "run.name=new"
    )
    other = write_checkpoint(base.folder / "other", rolling_tag(8), 8)
    assert f"{other} is not one of its checkpoints: give RUN:TAG" in refused(f"BASE:{other}", "run.name=new")


def test_a_parent_without_checkpoints_may_have_backups(refused: Callable[..., str], base: Base) -> None:
    shutil.rmtree(base.checkpoints)
    message = f"cannot fork base: it has no full checkpoint in {base.checkpoints}"
    assert refused("BASE", "run.name=new").strip() == f"error: {message}"
    write_settings(base.settings("base", checkpoint__backup__to=str(base.folder / "backups")))
    assert f"{message}; fetch a backup first: `./launch.sh backup {base.run_dir} --fetch TAG`" in refused(
        "BASE", "run.name=new"
    )


def test_a_run_that_exists_is_not_replaced(refused: Callable[..., str], base: Base) -> None:
    settings = base.settings()
    settings.run_dir.mkdir()
    Journal(settings.run_dir).write("start", "started", 0)
    resume = f"resume it with `./launch.sh resume {settings.run_dir}`, or choose another run.name for the fork"
    assert f"run new exists already ({settings.run_dir / 'journal.jsonl'}): {resume}" in refused("BASE", "run.name=new")
    shutil.rmtree(settings.run_dir)
    create(base.plan("8"))
    append_start(settings.run_dir, {"from_step": 8})
    assert "run new is a fork of base at step 8 already" in refused("BASE:8", "run.name=new")


def test_a_damaged_checkpoint_is_skipped_unless_it_is_named(
    refused: Callable[..., str], base: Base, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(base.checkpoints / rolling_tag(12))
    for tag in ("latest", "before:13"):
        assert base.plan(tag).record.step == 8
        assert "warning: checkpoint" in (err := capfd.readouterr().err) and "sha256 mismatch" in err
    message = refused("BASE:12", "run.name=new")
    assert "rolling_step_000012 cannot be used: " in message and "sha256 mismatch; choose another: " in message
    for step in STEPS:
        (base.checkpoints / rolling_tag(step) / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        base.plan()


def test_a_fork_has_its_own_files_and_leaves_the_parent_unchanged(base: Base) -> None:
    before = tree(base.folder)
    create(base.plan("8"))
    assert {name: found for name, found in tree(base.folder).items() if name in before} == {
        **before,
        **dict.fromkeys(("runs", "checkpoints"), (0, 0)),
    }
    settings = base.settings()
    record = read_fork(settings.run_dir)
    assert record == Fork("base", str(base.run_dir), rolling_tag(8), 8, record.time if record else "")
    (found,) = scan(settings.checkpoint_dir)
    assert found.tag == rolling_tag(8) and problem_of(found) is None
    assert read_pointer(settings.checkpoint_dir, LATEST) == rolling_tag(8)
    owner = read_owner(settings.checkpoint_dir)
    assert owner is not None and owner.run_dir == settings.run_dir
    name = next(iter(found.manifest.files)) if found.manifest else ""
    assert os.path.samefile(found.path / name, base.checkpoints / rolling_tag(8) / name)
    check_start(settings, batch_plan(settings), "latest")
    for directory in (base.run_dir, base.checkpoints):
        shutil.rmtree(directory)
    assert problem_of(scan(settings.checkpoint_dir)[0]) is None
    check_start(settings, batch_plan(settings), "latest")


def test_of_two_commands_at_once_one_creates_the_run(base: Base) -> None:
    first, second = base.plan("8"), base.plan("12")
    create(first)
    with pytest.raises(UserError, match="run new is a fork of base at step 8 already"):
        create(second)
    directory = base.settings("b").checkpoint_dir
    directory.mkdir()
    with pytest.raises(UserError, match="run b is in use by process"), lock(directory / LOCK, "it"):
        create(base.plan("8", "b"))


def test_a_checkpoint_that_the_parent_deletes_meanwhile_is_an_error_and_leaves_nothing_partial(base: Base) -> None:
    planned = base.plan("8")
    shutil.rmtree(planned.source)
    with pytest.raises(UserError, match="rolling_step_000008 was deleted meanwhile: repeat the command"):
        create(planned)
    assert not list(base.settings().checkpoint_dir.glob("*.tmp"))
    create(base.plan("12"))
    record = read_fork(base.settings().run_dir)
    assert record is not None and record.step == 12


@pytest.mark.parametrize("when", ["before", "while it is linked"])
def test_a_checkpoint_that_the_parent_replaces_meanwhile_is_not_forked(
    base: Base, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The files of both checkpoints have the same sizes."""
    known = scan(base.checkpoints)[0].manifest
    assert known is not None
    (base.checkpoints / rolling_tag(8)).rename(base.checkpoints / "best_model")
    planned = base.plan("best")

    def replace() -> None:
        shutil.rmtree(planned.source)
        other = {name: content.swapcase() for name, content in FILES.items()}
        write_checkpoint(base.checkpoints, "best_model", 12, other, identity=known.identity, settings=known.settings)

    class ReplacingDisk(Disk):
        links = 0

        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            self.links += 1
            if self.links == 1:
                replace()

    if when == "before":
        replace()
    with pytest.raises(UserError, match="best_model was replaced meanwhile: repeat the command"):
        create(planned, Disk() if when == "before" else ReplacingDisk())
    settings = base.settings()
    assert not scan(settings.checkpoint_dir) and not list(settings.checkpoint_dir.glob("*.tmp"))
    create(base.plan("best"))
    (found,) = scan(settings.checkpoint_dir)
    assert (found.tag, found.step, problem_of(found)) == (rolling_tag(12), 12, None)


def test_the_results_of_an_evaluation_that_ends_meanwhile_are_taken_over(base: Base) -> None:
    """The parent's newest checkpoint is forked also while it is evaluated; the fork then repeats the evaluation."""
    path = base.checkpoints / rolling_tag(12)
    evaluated = read(path)
    interrupted = evaluated.model_copy(update={"state": {**evaluated.state, "unevaluated": {"train/loss": 5.0}}})
    commit.replace_manifest(Disk(), path, interrupted)
    first, second = base.plan("latest", "a"), base.plan("latest", "b")
    assert first.record.step == 12
    create(first)
    commit.replace_manifest(Disk(), path, evaluated)
    create(second)
    found = [read(base.settings(name).checkpoint_dir / rolling_tag(12)) for name in ("a", "b")]
    assert found == [interrupted, evaluated]


def test_the_settings_are_those_of_the_command_that_creates_the_fork(base: Base) -> None:
    """An interrupted command has written others."""
    earlier = base.settings(schedule__max_lr="1e-3")
    earlier.run_dir.mkdir(parents=True)
    write_settings(earlier)
    create(base.plan("8", schedule__max_lr="2e-3"))
    assert run_location.load_run_settings(earlier.run_dir).schedule.max_lr == 2e-3


def test_an_epoch_is_linked_as_a_rolling_checkpoint_and_a_fork_names_its_ancestors(base: Base) -> None:
    (base.checkpoints / rolling_tag(12)).rename(base.checkpoints / "epoch_00001")
    write_fork(base.run_dir, Fork("root", "/root", rolling_tag(2), 2, "", (Ancestor("first", 1),)))
    planned = base.plan("epoch_00001")
    assert planned.record.ancestors == (Ancestor("root", 2), Ancestor("first", 1))
    lineage = "base at step 12, itself forked from root at 2, itself forked from first at 1"
    assert planned.record.lineage == lineage
    create(planned)
    assert scan(base.settings().checkpoint_dir)[0].tag == rolling_tag(12)


def test_where_hard_links_are_not_supported_the_files_are_copied(base: Base) -> None:
    create(base.plan("8"), RecordingDisk(base.folder, links=False))
    (found,) = scan(base.settings().checkpoint_dir)
    assert problem_of(found) is None
    assert not os.path.samefile(found.path / MANIFEST, base.checkpoints / rolling_tag(8) / MANIFEST)


def test_a_copy_to_another_disk_needs_twice_the_space(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "_must_copy", lambda checkpoint, directory: True)
    monkeypatch.setattr(Disk, "free_bytes", lambda disk, path: SIZE + 100)
    with pytest.raises(UserError, match=r"twice \(the copy and the first save\)"):
        base.plan("8", checkpoint__min_free_gb="0")
    monkeypatch.setattr(fork, "_must_copy", lambda checkpoint, directory: False)
    base.plan("8", checkpoint__min_free_gb="0")


def test_files_that_cannot_be_linked_on_the_same_disk_need_twice_the_space_too(
    base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: object, target: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # fs.protected_hardlinks, files of another user

    monkeypatch.setattr(os, "link", refuse)
    planned = base.plan("8", checkpoint__min_free_gb="0")
    monkeypatch.setattr(Disk, "free_bytes", lambda disk, path: SIZE + 100)
    with pytest.raises(UserError, match=r"twice \(the copy and the first save\)"):
        base.plan("8", checkpoint__min_free_gb="0")
    create(planned)
    assert f"copying {planned.source} to " in capsys.readouterr().out
    assert problem_of(scan(base.settings().checkpoint_dir)[0]) is None


def test_a_kill_at_any_instant_leaves_no_fork_or_a_complete_one_and_a_repetition_completes_it(base: Base) -> None:
    parent = tree(base.checkpoints)
    settings, kills = base.settings(), 0
    request = find_parent(f"{base.run_dir}:8", settings)
    for operations in range(100):
        disk = RecordingDisk(base.folder)
        disk.dies_at = operations
        try:
            create(base.plan("8"), disk)
        except KilledError:
            kills += 1
        else:
            break
        complete = [found.tag for found in scan(settings.checkpoint_dir)] == [rolling_tag(8)]
        assert is_complete(settings, request) == complete
        if has_unfinished_commit(settings.checkpoint_dir):  # the ranks would complete it, and refuse a new run then
            CheckpointDirectory(Disk(), settings.checkpoint_dir, settings.checkpoint).start()
            complete = True
        with pytest.raises(UserError) as error:  # never from the beginning
            check_start(settings, batch_plan(settings), None)
        if complete:
            assert problem_of(scan(settings.checkpoint_dir)[0]) is None
            CheckpointDirectory(Disk(), settings.checkpoint_dir, settings.checkpoint).start()
            assert read_pointer(settings.checkpoint_dir, LATEST) == rolling_tag(8)
        else:
            assert isinstance(error.value, CheckpointsGoneError)
            assert "is a fork of base at step 8, but its checkpoint is not in" in str(error.value)
            create(base.plan("8"))
            assert is_complete(settings, request)
        for directory in (settings.run_dir, settings.checkpoint_dir):
            shutil.rmtree(directory)
    assert kills > 5 and tree(base.checkpoints) == parent


def test_a_fork_that_is_not_started_is_completed_only_by_the_same_request(base: Base) -> None:
    create(base.plan("8"))
    settings = base.settings()
    for tag, same in (("8", True), (rolling_tag(8), True), ("latest", True), ("12", False)):
        request = find_parent(f"{base.run_dir}:{tag}", settings)
        if same:
            assert is_complete(settings, request)
        else:
            with pytest.raises(UserError, match="run new is a fork of base at step 8 already, not started yet: start"):
                is_complete(settings, request)
    append_start(settings.run_dir, {"from_step": 8})
    assert not is_complete(settings, request)


def test_auto_resumes_a_fork_of_the_same_parent_also_without_the_parent(base: Base) -> None:
    settings, text = base.settings(), f"{base.run_dir}:8"
    assert not is_begun(settings, text)
    write_fork_only = base.plan("8").record
    settings.run_dir.mkdir()
    write_fork(settings.run_dir, write_fork_only)
    assert not is_begun(settings, text)  # its checkpoint is not linked yet
    create(base.plan("8"))
    shutil.rmtree(base.run_dir)
    for same in (text, f"{base.run_dir}", "base:before:9", f"{base.run_dir}/"):
        assert is_begun(settings, same)
    with pytest.raises(UserError, match="run new is a fork of base at step 8, not of other:8"):
        is_begun(settings, "other:8")
    with pytest.raises(UserError, match="run new is a fork of base at step 8, not of base:4"):
        is_begun(settings, "base:4")
    shutil.rmtree(settings.checkpoint_dir)
    append_start(settings.run_dir, {"from_step": 8})
    assert is_begun(settings, text)  # the supervisor then waits for the checkpoints
    with pytest.raises(CheckpointsGoneError, match="was saved at step 8, but there is no checkpoint"):
        check_start(settings, batch_plan(settings), "auto")


def test_a_directory_with_colons_is_a_run(base: Base) -> None:
    moved = base.folder / "with:8" / "runs" / "base"
    shutil.copytree(base.run_dir, moved)
    for text, selector in (("", "latest"), (":8", "8"), (":before:9", "before:9")):
        parent = find_parent(f"{moved}{text}", base.settings())
        assert (parent.run_dir, parent.selector) == (moved, selector)


def test_the_settings_of_the_parent_may_be_used(base: Base) -> None:
    planned = base.plan("8")
    stored = run_location.load(base.run_dir / CONFIG, {"run.name": "new"})
    assert plan_fork(stored, batch_plan(stored), find_parent(f"{base.run_dir}:8", stored)).source == planned.source


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    assert read_fork(tmp_path) is None
    valid = {"run": "base", "run_dir": "/", "tag": "t", "step": 1, "time": "", "ancestors": []}
    (tmp_path / FORK).write_text(json.dumps(valid))
    assert read_fork(tmp_path) is not None
    for damaged in ("", "[]", "{}", json.dumps({**valid, "step": -1}), json.dumps({**valid, "run": 1})):
        (tmp_path / FORK).write_text(damaged)
        with pytest.raises(UserError, match="is damaged: restore it from a copy of the run"):
            read_fork(tmp_path)


@pytest.mark.parametrize("arguments", [["--fork", "base"], ["--fork"]])
def test_ranks_without_a_supervisor_refuse_a_fork(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from ds_gpt2 import train

    assert train.main(["--config", "x.yaml", *arguments]) == exit_codes.MISTAKE
    assert "--fork works with `./launch.sh train` only" in capsys.readouterr().err
