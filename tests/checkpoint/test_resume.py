"""The choice of the checkpoint to resume from, on one rank, among damaged, foreign and malicious checkpoints."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gpt2.checkpoint import resume, verify
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.catalog import open_generation
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest, encode
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import BackupSettings
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file

IDENTITY = {"model.layers": 2, "model.width": 32, "data": "abc"}


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def _checkpoint(directory: Path, step: int, content: Any = None, **changes: Any) -> Path:
    """Write a committed checkpoint with a valid manifest; its files may contain anything."""
    path = directory / f"rolling_step_{step:06d}"
    path.mkdir(parents=True)
    files = {}
    model = {"module": {"w": torch.ones(6)}, "dp_world_size": 1, "ds_gpt2": {"state": {"step": step}}}
    moments = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(6)}}
    state = {"single_partition_of_fp32_groups": [torch.ones(6)], "base_optimizer_state": {"state": moments}}
    usual = {MODEL_FILE: model, partition_file(0): {"optimizer_state_dict": state}}
    for name in (MODEL_FILE, partition_file(0)):
        torch.save((content or usual[name]) if not callable(content) else content(name, usual[name]), path / name)
        data = (path / name).read_bytes()
        files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    fields: dict[str, Any] = {
        "created": "2026-01-01T00:00:00+00:00",
        "epoch": 0.5,
        "state": {"step": step},
        "world_size": 1,
        "identity": IDENTITY,
        "settings": {},
        "versions": {},
        "files": files,
    }
    (path / MANIFEST).write_bytes(encode(Manifest(**{**fields, **changes})))
    return path


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ds_gpt2"), "propagate", True)


def test_the_newest_intact_checkpoint_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _checkpoint(tmp_path, step)
    restored = resume.choose_checkpoint(tmp_path, "latest", IDENTITY)
    assert restored.generation.tag == "rolling_step_000015"
    assert list(restored.contents) == [MODEL_FILE, partition_file(0)]
    assert restored.contents[MODEL_FILE]["ds_gpt2"]["state"]["step"] == 15


def test_each_damaged_checkpoint_is_logged_and_the_next_older_one_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10, 15, 20):
        _checkpoint(tmp_path, step)
    (tmp_path / "rolling_step_000020" / partition_file(0)).unlink()
    damaged = tmp_path / "rolling_step_000015" / MODEL_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (tmp_path / "rolling_step_000010" / MANIFEST).write_text("{}")
    assert resume.choose_checkpoint(tmp_path, "auto", IDENTITY).generation.step == 5
    reasons = [record.getMessage() for record in caplog.records]
    assert f"rolling_step_000020 cannot be used: {partition_file(0)} is missing" in reasons[0]
    assert f"rolling_step_000015 cannot be used: {MODEL_FILE} is damaged" in reasons[1]
    assert f"rolling_step_000010 cannot be used: {MANIFEST} is damaged" in reasons[2]


def test_if_all_checkpoints_are_damaged_no_new_run_starts(tmp_path: Path) -> None:
    (_checkpoint(tmp_path, 5) / MODEL_FILE).unlink()
    with pytest.raises(UserError, match=r"none of rolling_step_000005 in .* can be used"):
        resume.choose_checkpoint(tmp_path, "auto", IDENTITY)


def test_a_requested_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    (_checkpoint(tmp_path, 10) / MODEL_FILE).unlink()
    with pytest.raises(UserError, match="none of rolling_step_000010 in"):
        resume.choose_checkpoint(tmp_path, "10", IDENTITY)


@pytest.mark.parametrize("wanted", ["latest", "rolling_step_000010"])
def test_code_in_a_checkpoint_with_valid_hashes_never_runs(tmp_path: Path, wanted: str) -> None:
    owned = tmp_path / "owned"
    _checkpoint(tmp_path / "run", 5)
    _checkpoint(tmp_path / "run", 10, content={"state": _Code(owned)})
    if wanted == "latest":
        assert resume.choose_checkpoint(tmp_path / "run", wanted, IDENTITY).generation.step == 5
    else:
        with pytest.raises(UserError, match="none of"):
            resume.choose_checkpoint(tmp_path / "run", wanted, IDENTITY)
    assert not owned.exists()


def _cut(name: str, content: Any) -> Any:
    if name != MODEL_FILE:
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [torch.ones(4)]
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"] = torch.ones(4)
    return content


def _cut_moments(name: str, content: Any) -> Any:
    if name != MODEL_FILE:
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"] = torch.ones(4)
    return content


def _of_another_step(name: str, content: Any) -> Any:
    return {**content, "ds_gpt2": {"state": {"step": 7}}} if name == MODEL_FILE else content


def _with_more_state(name: str, content: Any) -> Any:
    """The manifest lacks this state: the data would be read from the first batch."""
    state = {"step": 10, "batch": 12}
    return {**content, "ds_gpt2": {"state": state}} if name == MODEL_FILE else content


def _of_more_ranks(name: str, content: Any) -> Any:
    return {**content, "dp_world_size": 4} if name == MODEL_FILE else content


def _without_state(name: str, content: Any) -> Any:
    return {"module": content["module"]} if name == MODEL_FILE else content


def _of_a_list(name: str, content: Any) -> Any:
    return content if name == MODEL_FILE else [1, 2]


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (_cut, "its partitions have 4 weights, the model has 6"),
        (_cut_moments, "has 4 elements of exp_avg for 6 weights"),
        (_of_another_step, f"{MODEL_FILE} has step 7, {MANIFEST} has 10"),
        (_with_more_state, f"{MODEL_FILE} has batch 12, {MANIFEST} has None"),
        (_of_more_ranks, f"was saved by 4 ranks, {MANIFEST} says 1"),
        (_without_state, f"has no state to compare with {MANIFEST}"),
        (_of_a_list, "is not an optimizer partition"),
    ],
)
def test_files_of_different_checkpoints_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forge: Any, problem: str
) -> None:
    """Their hashes are valid."""
    _checkpoint(tmp_path, 5)
    _checkpoint(tmp_path, 10, content=forge)
    assert resume.choose_checkpoint(tmp_path, "latest", IDENTITY).generation.step == 5
    assert problem in caplog.text
    assert verify.deep_problem(open_generation(tmp_path / "rolling_step_000010")) is not None


def test_a_checkpoint_of_another_model_is_refused_with_both_values(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5, identity={**IDENTITY, "model.width": 64, "model.layers": 4})
    expected = (
        r"was made with model\.layers 4 \(this run has 2\), model\.width 64 \(this run has 32\): restore these settings"
    )
    with pytest.raises(UserError, match=expected):
        resume.choose_checkpoint(tmp_path, "latest", IDENTITY)


def test_a_checkpoint_that_does_not_record_a_newer_setting_is_used(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    assert resume.choose_checkpoint(tmp_path, "latest", {**IDENTITY, "model.new": 1}).generation.step == 5


def test_a_checkpoint_of_weights_is_refused(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    _checkpoint(tmp_path, 10, kind="weights")
    assert resume.choose_checkpoint(tmp_path, "latest", IDENTITY).generation.step == 5
    with pytest.raises(UserError, match="none of"):
        resume.choose_checkpoint(tmp_path, "10", IDENTITY)


@pytest.mark.parametrize("wanted", ["../../etc", "/etc", "rolling_step_000005/../../..", "..", "~", "a\nb", ""])
def test_a_tag_that_leaves_the_directory_is_refused(tmp_path: Path, wanted: str) -> None:
    _checkpoint(tmp_path / "run", 5)
    with pytest.raises(UserError):
        resume.choose_checkpoint(tmp_path / "run", wanted, IDENTITY)


def test_a_run_without_checkpoints_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        resume.choose_checkpoint(tmp_path / "nowhere", "latest", IDENTITY)


def test_a_file_in_the_place_of_a_checkpoint_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "run"
    _checkpoint(directory, 5)
    (directory / "rolling_step_000010").write_text("")
    text = f"{directory}/rolling_step_000010 is a file, not the directory of a checkpoint: delete it, or restore"
    assert resume.choose_checkpoint(directory, "latest", IDENTITY).generation.step == 5
    assert text in caplog.text
    shutil.rmtree(directory / "rolling_step_000005")
    with pytest.raises(UserError, match=f"^nothing to resume: {re.escape(text)}"):
        resume.choose_checkpoint(directory, "latest", IDENTITY)


@pytest.mark.parametrize("local", ["gone", "damaged"])
def test_if_all_local_checkpoints_are_damaged_a_copy_is_fetched(
    tmp_path: Path, local: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nas").mkdir()
    backup = Backup(str(tmp_path / "nas"), "run", BackupSettings())
    for step in (5, 10):
        backup.copy(open_generation(_checkpoint(tmp_path / "run", step)))
    (tmp_path / "nas" / "run" / "rolling_step_000010" / MODEL_FILE).write_bytes(b"damaged copy")
    for path in (tmp_path / "run").iterdir():
        shutil.rmtree(path) if local == "gone" else (path / MODEL_FILE).write_bytes(b"damaged")
    restored = resume.choose_checkpoint(tmp_path / "run", "auto", IDENTITY, backup)
    assert restored.generation.path == tmp_path / "run" / "rolling_step_000005"
    assert restored.contents[MODEL_FILE]["ds_gpt2"]["state"] == {"step": 5}
    assert "rolling_step_000010 cannot be fetched" in caplog.text


def test_a_requested_checkpoint_is_not_replaced_by_a_copy(tmp_path: Path) -> None:
    (tmp_path / "nas").mkdir()
    backup = Backup(str(tmp_path / "nas"), "run", BackupSettings())
    backup.copy(open_generation(_checkpoint(tmp_path / "run", 5)))
    (tmp_path / "run" / "rolling_step_000005" / MODEL_FILE).unlink()
    with pytest.raises(UserError, match="none of rolling_step_000005"):
        resume.choose_checkpoint(tmp_path / "run", "5", IDENTITY, backup)
    path = str(tmp_path / "nas" / "run")
    assert resume.choose_checkpoint(tmp_path / "run", path, IDENTITY, backup).generation.step == 5
