"""Models of damaged, forged and changing checkpoints, opened by ``export`` and ``generate``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from exported_model import TAG, Exported, refused

from ds_gpt2.checkpoint import weights
from ds_gpt2.checkpoint.manifest import FileEntry, encode
from ds_gpt2.checkpoint.manifest import read as read_manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import sha256
from ds_gpt2.tools.models.open import open_model


def test_a_damaged_checkpoint_is_refused(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "copy" / TAG))
    file = next(damaged.glob("bf16_zero_pp_rank_2*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    error = refused(capsys, "export", damaged, "--out", tmp_path / "out")
    assert f"{damaged} is damaged ({file.name}" in error and "--tag" in error
    assert not (tmp_path / "out").exists()


def test_files_of_two_checkpoints_are_never_mixed(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A training run replaces best_model while it is read: it is read again."""
    best = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / "best_model", tmp_path / "copy" / "best_model"))
    newer = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "newer"))
    read = weights.fp32_weights
    replaced: list[Path] = []

    def replacing(path: Path, kind: Any) -> dict[str, torch.Tensor]:
        found = read(path, kind)
        if len(replaced) < often:
            replaced.append(best.rename(tmp_path / f"old_{often}_{len(replaced)}"))
            shutil.copytree(newer, best)
        return found

    monkeypatch.setattr(weights, "fp32_weights", replacing)
    often = 1
    opened = open_model(str(best), None)
    assert opened.manifest is not None and opened.manifest.step == 12 and len(replaced) == 1
    assert all(torch.equal(opened.weights[name], each) for name, each in read(newer).items())
    replaced.clear()
    often = 99
    assert "was replaced repeatedly" in refused(capsys, "generate", best)


def test_a_forged_checkpoint_runs_no_code(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its checksums are valid: an attacker can also write the manifest."""
    forged = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "copy" / TAG))
    file = next(forged.glob("bf16_zero_pp_rank_0*"))
    torch.save({"optimizer_state_dict": Harmful(tmp_path / "code was run")}, file)
    entry = FileEntry(bytes=file.stat().st_size, sha256=sha256(file))
    original = read_manifest(exported[0] / "checkpoints" / "test" / TAG)
    (forged / "manifest.json").write_bytes(
        encode(original.model_copy(update={"files": original.files | {file.name: entry}}))
    )
    assert f"{forged} cannot be read: " in refused(capsys, "export", forged, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_an_unfinished_checkpoint_is_ignored(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unfinished = tmp_path / "checkpoints" / "rolling_step_000012.tmp"
    shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, unfinished)
    (unfinished / "manifest.json").unlink()
    assert "no checkpoints" in refused(capsys, "export", unfinished.parent, "--out", tmp_path / "out")


@pytest.mark.parametrize("tag", ["rolling_step_000099", "epoch_00009"])
def test_an_unknown_tag_is_refused(exported: Exported, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    assert f"no checkpoint '{tag}'" in refused(capsys, "export", exported[0] / "runs" / "test", "--tag", tag)


def test_the_error_of_a_damaged_checkpoint_gives_the_command_that_lists_others(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "my checkpoints", rolling_tag(10), 10)
    (path / "mp_rank_00_model_states.pt").write_bytes(b"other")
    with pytest.raises(UserError) as refused:
        open_model(str(path), None)
    assert str(refused.value).startswith(f"{path} is damaged (mp_rank_00_model_states.pt ")
    assert str(refused.value).endswith(f"): choose another with --tag, see `./launch.sh list '{path.parent}'`")
