"""``prune``, on checkpoints that were never trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, size_of, write_checkpoint

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import rolling_tag, superseded_tag
from ds_gpt2.run_dir import exit_codes

Command = Callable[..., tuple[int, str, str]]
InJson = Callable[..., tuple[int, Any]]


def test_prune_deletes_the_checkpoints_that_no_policy_keeps(history: Path, in_json: InJson, command: Command) -> None:
    size = size_of(history / rolling_tag(100))
    (history / "rolling_step_000050.tmp").mkdir()
    expected = {"directory": str(history), "dry_run": True, "deleted": [rolling_tag(100)], "freed_bytes": size}
    assert in_json("prune", "test", "--dry-run") == (exit_codes.DONE, {**expected, "failures": []})
    printed = command("prune", "test", "--dry-run")[1]
    assert printed == f"{rolling_tag(100)} would be deleted\n0.0 MB would be freed\n"
    assert (history / rolling_tag(100) / "manifest.json").exists()
    assert in_json("prune", "test") == (exit_codes.DONE, {**expected, "dry_run": False, "failures": []})
    left = {path.name for path in history.iterdir() if path.is_dir()}
    assert left == {rolling_tag(300), rolling_tag(200), "epoch_00001", "best_model", "rolling_step_000050.tmp"}
    assert command("prune", "test")[1] == "0.0 MB freed\n"


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_prune_counts_the_bytes_that_become_free(
    run_with: Callable[..., Path], in_json: InJson, options: list[str]
) -> None:
    """Both tags of step 100 are deleted; step 200 remains as best_model. Only the former frees space."""
    directory = run_with(keep_last=1, keep_epochs=1)
    for step in (100, 200, 300, 400):
        write_checkpoint(directory, rolling_tag(step), step)
    commit.link(Disk(), directory / rolling_tag(100), directory, "epoch_00001")
    commit.link(Disk(), directory / rolling_tag(400), directory, "epoch_00004")
    commit.link(Disk(), directory / rolling_tag(200), directory, "best_model")
    size = size_of(directory / rolling_tag(100))
    result = in_json("prune", "test", *options)[1]
    assert sorted(result["deleted"]) == ["epoch_00001", rolling_tag(100), rolling_tag(200)]
    assert result["freed_bytes"] == size


def test_prune_protects_the_newest_two_good_checkpoints(history: Path, in_json: InJson) -> None:
    """With the newest damaged, step 100 is one of the two; the policies alone would delete it."""
    (history / rolling_tag(300) / next(iter(FILES))).write_bytes(FILES[next(iter(FILES))].upper())
    assert in_json("prune", "test")[1]["deleted"] == []
    write_checkpoint(history, rolling_tag(50), 50)
    assert in_json("prune", "test")[1]["deleted"] == [rolling_tag(50)]


def test_prune_deletes_nothing_with_fewer_than_two_good_checkpoints(
    history: Path, command: Command, in_json: InJson
) -> None:
    write_checkpoint(history, superseded_tag(250), 250)
    for step in (200, 300):
        (history / rolling_tag(step) / "manifest.json").write_text("{}")
    code, _, err = command("prune", "test")
    assert code == exit_codes.MISTAKE
    assert err == (
        f"error: nothing is deleted: {history} has 4 damaged checkpoints; only 1 step of the run has a good one, and 2"
        " are required; `./launch.sh verify test --all` lists the problems\n"
    )
    assert sum(row["problem"] is not None for row in in_json("list", "test")[1]) == 4
    assert (history / rolling_tag(100)).exists() and (history / superseded_tag(250)).exists()


def test_prune_deletes_nothing_without_good_checkpoints(history: Path, command: Command) -> None:
    for path in history.glob(f"rolling_*/{next(iter(FILES))}"):
        path.write_bytes(b"")
    elsewhere = history.rename(history.with_name("moved away"))
    code, _, err = command("prune", elsewhere)
    assert code == exit_codes.MISTAKE
    assert "has 5 damaged checkpoints; no step of the run has a good one, and 2 are required" in err
    assert f"`./launch.sh verify '{elsewhere}' --all`" in err


def test_prune_ignores_checkpoints_deleted_by_the_run(
    history: Path, in_json: InJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(history, rolling_tag(50), 50)
    original, left = commit.remove, [rolling_tag(50), rolling_tag(100)]

    def remove(disk: Disk, directory: Path, tag: str) -> None:
        shutil.rmtree(directory / left.pop())  # first the next checkpoint, then this one
        original(disk, directory, tag)

    monkeypatch.setattr(commit, "remove", remove)
    code, result = in_json("prune", "test")
    assert (code, result["deleted"], result["failures"]) == (exit_codes.DONE, [rolling_tag(50)], [])


def test_prune_ignores_files_deleted_by_the_run(
    history: Path, in_json: InJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Disk.unlink

    def unlink(self: Disk, path: Path) -> None:
        original(self, path)
        shutil.rmtree(path.parent)  # the run deletes the directory between two operations

    monkeypatch.setattr(Disk, "unlink", unlink)
    code, result = in_json("prune", "test")
    assert (code, result["deleted"], result["failures"]) == (exit_codes.DONE, [rolling_tag(100)], [])


def test_prune_reports_failed_deletions(history: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Disk, path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Disk, "unlink", refuse)
    code, out, _ = command("prune", "test")
    assert code == exit_codes.CRASHED
    assert out.startswith(f"could not delete {rolling_tag(100)}: [Errno 30] Read-only file system")
    assert out.endswith("0.0 MB freed\n")


def test_prune_requires_readable_settings(tmp_path: Path, project: Path, command: Command) -> None:
    for step in range(1, 5):
        write_checkpoint(tmp_path / "bare", rolling_tag(step), step, settings={"checkpoint": {"keep_lots": 5}})
    code, _, err = command("prune", tmp_path / "bare")
    assert code == exit_codes.MISTAKE and f"retention settings of {tmp_path}/bare not found" in err
    assert len(list((tmp_path / "bare").iterdir())) == 4


def test_prune_uses_the_current_settings_of_the_run(run_with: Callable[..., Path], in_json: InJson) -> None:
    directory = run_with(keep_last=3)
    for step in range(1, 6):
        write_checkpoint(directory, rolling_tag(step), step)  # with keep_last=1 in the manifests
    for name in (directory, "test"):
        assert in_json("prune", name, "--dry-run")[1]["deleted"] == [rolling_tag(1), rolling_tag(2)]
