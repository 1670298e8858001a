"""The directory of checkpoints beyond the crash tests: free space, missing roles, the recovery script."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from disks import PausableDisk, SmallDisk

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag, rolling_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import CheckpointSettings

CONTENT = b"weights" * 1000
SETTINGS = CheckpointSettings(min_free_gb=0)


def _save(directory: Path, step: int, loss: float | None = None, roles: tuple[str, ...] = ()) -> str:
    tag = rolling_tag(step)
    partial = directory / f"{tag}.tmp"
    partial.mkdir(parents=True)
    (partial / "state.pt").write_bytes(CONTENT)
    commit.commit(
        Disk(),
        directory,
        tag,
        Manifest(
            created="2026-01-01T00:00:00+00:00",
            epoch=0.5,
            state={"step": step, "val_loss": loss, "val_step": step},
            roles=list(roles),
            world_size=1,
            identity={},
            settings={},
            versions={},
            files={"state.pt": FileEntry(bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())},
        ),
    )
    return tag


def _tags(directory: Path) -> list[str]:
    return [found.tag for found in scan(directory)]


@pytest.fixture(autouse=True)
def _propagate_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ds_gpt2"), "propagate", True)


def test_a_run_without_space_for_a_checkpoint_does_not_start(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(SmallDisk(999), tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"has 0\.0 MB free; a checkpoint takes .* free some space, or set"):
        checkpoints.check_free_space(1000)
    CheckpointDirectory(SmallDisk(1000), tmp_path, SETTINGS).check_free_space(1000)
    _save(tmp_path, 5)
    checkpoints.check_free_space(1000)  # a run with checkpoints continues: old ones can be deleted


def test_on_a_full_disk_old_checkpoints_are_deleted_but_never_the_newest_two_or_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SmallDisk(6 * len(CONTENT))
    checkpoints = CheckpointDirectory(disk, tmp_path, SETTINGS)
    for step, loss in ((5, 2.0), (10, 3.0), (15, 3.0), (20, 3.0), (25, 3.0)):
        checkpoints.after_commit(_save(tmp_path, step, loss), [BEST_TAG])
    assert checkpoints.prepare_for(rolling_tag(30), 0)
    assert len(_tags(tmp_path)) == 6
    disk.size = 4 * len(CONTENT)
    assert checkpoints.prepare_for(rolling_tag(30), 0)
    assert _tags(tmp_path) == [rolling_tag(25), rolling_tag(20), BEST_TAG]
    disk.size = len(CONTENT)
    assert not checkpoints.prepare_for(rolling_tag(30), 0)
    assert _tags(tmp_path) == [rolling_tag(25), rolling_tag(20), BEST_TAG]
    assert "no checkpoint was saved" in caplog.text


def test_the_remains_of_an_earlier_attempt_are_deleted(tmp_path: Path) -> None:
    partial = tmp_path / f"{rolling_tag(5)}.tmp"
    partial.mkdir()
    (partial / "rank_00001.json").write_text('{"files": {}}')
    assert CheckpointDirectory(Disk(), tmp_path, SETTINGS).prepare_for(rolling_tag(5), 0)
    assert not partial.exists()


def test_a_start_creates_the_roles_that_a_crash_has_prevented(tmp_path: Path) -> None:
    _save(tmp_path, 5, loss=3.0)
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert (tmp_path / BEST_TAG / "manifest.json").samefile(tmp_path / rolling_tag(5) / "manifest.json")
    _save(tmp_path, 10, loss=2.0, roles=(epoch_tag(1), BEST_TAG))  # killed after the commit
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    for role in (BEST_TAG, epoch_tag(1)):
        assert (tmp_path / role / "manifest.json").samefile(tmp_path / rolling_tag(10) / "manifest.json")
    assert commit.read_pointer(tmp_path, "latest") == rolling_tag(10)


def test_clean_up_continues_after_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{epoch_tag(1)}.tmp" / "a directory").mkdir(parents=True)
    (tmp_path / f"{rolling_tag(5)}.tmp").mkdir()
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert not (tmp_path / f"{rolling_tag(5)}.tmp").exists()
    assert f"could not clean up {tmp_path / epoch_tag(1)}.tmp" in caplog.text


def test_the_recovery_script_is_complete(tmp_path: Path) -> None:
    from deepspeed.utils import zero_to_fp32

    (tmp_path / "zero_to_fp32.py").write_text("cut by a cra")
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert (tmp_path / "zero_to_fp32.py").read_text() == Path(zero_to_fp32.__file__).read_text()


def test_a_checkpoint_of_another_run_becomes_part_of_the_history(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for step in (5, 15):
        _save(own, step)
    _save(other, 10)
    checkpoints = CheckpointDirectory(Disk(), own, SETTINGS)
    checkpoints.resume_from(scan(other)[0])
    assert _tags(own) == ["superseded_step_000015", rolling_tag(10), rolling_tag(5)]
    assert [problem_of(generation) for generation in scan(own)] == [None] * 3
    assert commit.read_pointer(own, "latest") == rolling_tag(10)
    assert _tags(other) == [rolling_tag(10)]


def test_a_run_resumes_on_a_full_disk_although_latest_cannot_be_updated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        _save(tmp_path, step)
    commit.point_to(Disk(), tmp_path, rolling_tag(5))
    disk = PausableDisk()
    disk.full = True
    CheckpointDirectory(disk, tmp_path, SETTINGS).resume_from(scan(tmp_path)[0])
    assert "could not update latest: OSError(28, 'No space left on device')" in caplog.text
    assert _tags(tmp_path) == [rolling_tag(10), rolling_tag(5)]


def test_the_deletion_of_superseded_checkpoints_is_announced_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    checkpoints = CheckpointDirectory(Disk(), tmp_path, SETTINGS.model_copy(update={"keep_last": 2}))
    for step in (5, 15):
        _save(tmp_path, step)
    checkpoints.resume_from(scan(tmp_path)[1])
    announced = "superseded; it is deleted when the run has 2 rolling checkpoints (checkpoint.keep_last)"
    assert announced in caplog.text
    caplog.clear()
    checkpoints.after_commit(_save(tmp_path, 10), [])
    assert _tags(tmp_path) == [rolling_tag(10), rolling_tag(5)]
    assert "deleting superseded_step_000015: superseded, and checkpoint.keep_last is 2" in caplog.text
