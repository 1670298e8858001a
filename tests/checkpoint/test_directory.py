"""What is not told by the crash tests: room on the disk, roles made up for, the script for DeepSpeed's users."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

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


class SmallDisk(Disk):
    """Has room for so many bytes of checkpoints; links cost nothing."""

    def __init__(self, size: int) -> None:
        self.size = size

    def free_bytes(self, path: Path) -> int:
        files = {file.stat().st_ino: file.stat().st_size for file in path.rglob("*.pt")}
        return self.size - sum(files.values())


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
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ds_gpt2"), "propagate", True)


def test_a_run_that_could_not_keep_one_checkpoint_does_not_start(tmp_path: Path) -> None:
    house = CheckpointDirectory(SmallDisk(999), tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"has 0\.00 GB free; a checkpoint takes .* make room, or set checkpoint\.dir"):
        house.check_free_space(1000)
    CheckpointDirectory(SmallDisk(1000), tmp_path, SETTINGS).check_free_space(1000)
    _save(tmp_path, 5)
    house.check_free_space(1000)  # one that has some goes on: they may give way


def test_when_the_disk_is_full_old_ones_give_way_but_never_the_newest_two_or_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SmallDisk(6 * len(CONTENT))
    house = CheckpointDirectory(disk, tmp_path, SETTINGS)
    for step, loss in ((5, 2.0), (10, 3.0), (15, 3.0), (20, 3.0), (25, 3.0)):
        house.after_commit(_save(tmp_path, step, loss), [BEST_TAG])
    assert house.prepare_for(rolling_tag(30), 0)
    assert len(_tags(tmp_path)) == 6
    disk.size = 4 * len(CONTENT)
    assert house.prepare_for(rolling_tag(30), 0)
    assert _tags(tmp_path) == [rolling_tag(25), rolling_tag(20), BEST_TAG]
    disk.size = len(CONTENT)
    assert not house.prepare_for(rolling_tag(30), 0)
    assert _tags(tmp_path) == [rolling_tag(25), rolling_tag(20), BEST_TAG]
    assert "NO CHECKPOINT IS SAVED" in caplog.text


def test_what_an_earlier_attempt_left_is_not_built_upon(tmp_path: Path) -> None:
    partial = tmp_path / f"{rolling_tag(5)}.tmp"
    partial.mkdir()
    (partial / "rank_00001.json").write_text('{"files": {}}')
    assert CheckpointDirectory(Disk(), tmp_path, SETTINGS).prepare_for(rolling_tag(5), 0)
    assert not partial.exists()


def test_a_start_makes_up_for_roles_that_a_crash_has_prevented(tmp_path: Path) -> None:
    _save(tmp_path, 5, loss=3.0)
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert (tmp_path / BEST_TAG / "manifest.json").samefile(tmp_path / rolling_tag(5) / "manifest.json")
    _save(tmp_path, 10, loss=2.0, roles=(epoch_tag(1), BEST_TAG))  # and killed
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    for role in (BEST_TAG, epoch_tag(1)):
        assert (tmp_path / role / "manifest.json").samefile(tmp_path / rolling_tag(10) / "manifest.json")
    assert commit.read_pointer(tmp_path, "latest") == rolling_tag(10)


def test_one_thing_that_cannot_be_cleaned_up_keeps_nothing_else_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{epoch_tag(1)}.tmp" / "a directory").mkdir(parents=True)
    (tmp_path / f"{rolling_tag(5)}.tmp").mkdir()
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert not (tmp_path / f"{rolling_tag(5)}.tmp").exists()
    assert f"could not clean up {tmp_path / epoch_tag(1)}.tmp" in caplog.text


def test_the_script_for_deepspeeds_users_is_there_and_whole(tmp_path: Path) -> None:
    from deepspeed.utils import zero_to_fp32

    (tmp_path / "zero_to_fp32.py").write_text("cut by a cra")
    CheckpointDirectory(Disk(), tmp_path, SETTINGS).start()
    assert (tmp_path / "zero_to_fp32.py").read_text() == Path(zero_to_fp32.__file__).read_text()


def test_a_checkpoint_from_elsewhere_becomes_part_of_the_runs_history(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for step in (5, 15):
        _save(own, step)
    _save(other, 10)
    house = CheckpointDirectory(Disk(), own, SETTINGS)
    house.resume_from(scan(other)[0])
    assert _tags(own) == ["superseded_step_000015", rolling_tag(10), rolling_tag(5)]
    assert [problem_of(one) for one in scan(own)] == [None] * 3
    assert commit.read_pointer(own, "latest") == rolling_tag(10)
    assert _tags(other) == [rolling_tag(10)]
