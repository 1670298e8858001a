"""Choosing what to go on from, on one rank, over small checkpoints made by hand: bad, foreign and malicious ones."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gpt2.checkpoint import restore
from ds_gpt2.checkpoint.backup import Backup
from ds_gpt2.checkpoint.generations import open_generation
from ds_gpt2.checkpoint.layout import MANIFEST
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest, encode
from ds_gpt2.checkpoint.serializer import MODEL_FILE, partition_file
from ds_gpt2.config import BackupSettings
from ds_gpt2.errors import UserError

IDENTITY = {"model.layers": 2, "model.width": 32, "data": "abc"}


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def _checkpoint(directory: Path, step: int, content: Any = None, **changes: Any) -> Path:
    """A committed checkpoint, its manifest in order whatever is in its files."""
    path = directory / f"rolling_step_{step:06d}"
    path.mkdir(parents=True)
    files = {}
    for name in (MODEL_FILE, partition_file(0)):
        torch.save(content or {"step": step}, path / name)
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


def test_the_newest_that_is_good_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _checkpoint(tmp_path, step)
    restored = restore.choose(tmp_path, "latest", IDENTITY)
    assert restored.generation.tag == "rolling_step_000015"
    assert restored.contents == {MODEL_FILE: {"step": 15}, partition_file(0): {"step": 15}}


def test_each_bad_one_is_named_with_its_reason_and_the_next_older_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10, 15, 20):
        _checkpoint(tmp_path, step)
    (tmp_path / "rolling_step_000020" / partition_file(0)).unlink()
    damaged = tmp_path / "rolling_step_000015" / MODEL_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (tmp_path / "rolling_step_000010" / MANIFEST).write_text("{}")
    assert restore.choose(tmp_path, "auto", IDENTITY).generation.step == 5
    reasons = [record.getMessage() for record in caplog.records]
    assert f"rolling_step_000020 cannot be used: {partition_file(0)} is missing" in reasons[0]
    assert f"rolling_step_000015 cannot be used: {MODEL_FILE} is damaged" in reasons[1]
    assert f"rolling_step_000010 cannot be used: {MANIFEST} is damaged" in reasons[2]


def test_where_all_are_bad_nothing_starts_afresh(tmp_path: Path) -> None:
    (_checkpoint(tmp_path, 5) / MODEL_FILE).unlink()
    with pytest.raises(UserError, match=r"none of rolling_step_000005 in .* can be used"):
        restore.choose(tmp_path, "auto", IDENTITY)


def test_the_one_that_was_asked_for_has_no_substitute(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    (_checkpoint(tmp_path, 10) / MODEL_FILE).unlink()
    with pytest.raises(UserError, match="none of rolling_step_000010 in"):
        restore.choose(tmp_path, "10", IDENTITY)


@pytest.mark.parametrize("wanted", ["latest", "rolling_step_000010"])
def test_code_in_a_checkpoint_never_runs_though_its_hashes_are_right(tmp_path: Path, wanted: str) -> None:
    owned = tmp_path / "owned"
    _checkpoint(tmp_path / "run", 5)
    _checkpoint(tmp_path / "run", 10, content={"state": _Code(owned)})
    if wanted == "latest":
        assert restore.choose(tmp_path / "run", wanted, IDENTITY).generation.step == 5
    else:
        with pytest.raises(UserError, match="none of"):
            restore.choose(tmp_path / "run", wanted, IDENTITY)
    assert not owned.exists()


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5, identity={**IDENTITY, "model.width": 64, "model.layers": 4})
    expected = r"was made with model\.layers 4 \(this run has 2\), model\.width 64 \(this run has 32\): set it back"
    with pytest.raises(UserError, match=expected):
        restore.choose(tmp_path, "latest", IDENTITY)


def test_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    _checkpoint(tmp_path, 10, kind="weights")
    assert restore.choose(tmp_path, "latest", IDENTITY).generation.step == 5
    with pytest.raises(UserError, match="none of"):
        restore.choose(tmp_path, "10", IDENTITY)


@pytest.mark.parametrize("wanted", ["../../etc", "/etc", "rolling_step_000005/../../..", "..", "~", "a\nb", ""])
def test_a_tag_that_leads_elsewhere_is_refused(tmp_path: Path, wanted: str) -> None:
    _checkpoint(tmp_path / "run", 5)
    with pytest.raises(UserError):
        restore.choose(tmp_path / "run", wanted, IDENTITY)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        restore.choose(tmp_path / "nowhere", "latest", IDENTITY)


@pytest.mark.parametrize("local", ["gone", "damaged"])
def test_where_nothing_here_is_good_a_copy_is_fetched(
    tmp_path: Path, local: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "place").mkdir()
    backup = Backup(str(tmp_path / "place"), "run", BackupSettings())
    for step in (5, 10):
        backup.copy(open_generation(_checkpoint(tmp_path / "run", step)))
    (tmp_path / "place" / "run" / "rolling_step_000010" / MODEL_FILE).write_bytes(b"damaged there too")
    for path in (tmp_path / "run").iterdir():
        shutil.rmtree(path) if local == "gone" else (path / MODEL_FILE).write_bytes(b"damaged")
    restored = restore.choose(tmp_path / "run", "auto", IDENTITY, backup)
    assert restored.generation.path == tmp_path / "run" / "rolling_step_000005"
    assert restored.contents[MODEL_FILE] == {"step": 5}
    assert "rolling_step_000010 cannot be fetched" in caplog.text


def test_a_copy_is_no_substitute_for_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    backup = Backup(str(tmp_path / "place"), "run", BackupSettings())
    backup.copy(open_generation(_checkpoint(tmp_path / "run", 5)))
    (tmp_path / "run" / "rolling_step_000005" / MODEL_FILE).unlink()
    with pytest.raises(UserError, match="none of rolling_step_000005"):
        restore.choose(tmp_path / "run", "5", IDENTITY, backup)
    path = str(tmp_path / "place" / "run")
    assert restore.choose(tmp_path / "run", path, IDENTITY, backup).generation.step == 5
