"""Runs and settings files are found by name, by path and by default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from project_dir import add_run, use_as_project

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.lookup import find_config, find_run, started_runs


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two runs, started in 2025 and 2026, and two settings files."""
    use_as_project(tmp_path, monkeypatch)
    for name, year in (("newer", 2026), ("older", 2025)):
        run_dir = add_run(tmp_path, name, "run: {name: NAME}\n")
        start = {"time": f"{year}-01-01T00:00:00+0000", "run_dir": str(run_dir)}
        (run_dir / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "ds_configs").mkdir()
    for name in ("large.yaml", "small.yaml"):
        (tmp_path / "ds_configs" / name).write_text("model: {preset: 7M}\n")
    return tmp_path


def test_runs_are_found_by_name_and_path_and_the_newest_by_default(project: Path) -> None:
    runs = project / "runs"
    assert started_runs() == [runs / "older", runs / "newer"]
    assert find_run("older") == find_run(str(runs / "older")) == runs / "older"
    assert find_run(None) == runs / "newer"


def test_a_run_behind_the_parent_of_a_link_is_found(project: Path) -> None:
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "link").symlink_to(project / "runs" / "older")
    assert find_run(str(project / "elsewhere" / "link" / ".." / "newer")) == project / "runs" / "newer"


def test_an_unknown_run_lists_the_known_ones(project: Path) -> None:
    with pytest.raises(UserError, match=r"no run other; runs in .*/runs: older, newer$"):
        find_run("other")


def test_a_run_without_settings_is_named_with_the_fix(project: Path) -> None:
    run_dir = project / "runs" / "older"
    (run_dir / "config.yaml").unlink()
    message = f"{run_dir / 'config.yaml'} is missing: restore it from a copy of the run"
    for name in ("older", str(run_dir)):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            find_run(name)
    (project / "checkpoints" / "older").mkdir(parents=True)
    with pytest.raises(UserError, match=r"; `\./launch\.sh list older` and `verify` work on its checkpoints also with"):
        find_run("older")


@pytest.mark.parametrize("record", ["starts.jsonl", "journal.jsonl", "metrics.jsonl"])
def test_the_newest_run_is_not_replaced_by_another_if_its_settings_are_lost(project: Path, record: str) -> None:
    runs = project / "runs"
    (runs / "newer" / "config.yaml").unlink()
    (runs / "newer" / "starts.jsonl").rename(runs / "newer" / record)  # without starts, the time of the file counts
    assert started_runs() == [runs / "older", runs / "newer"]
    message = f"{runs}/newer/config.yaml of the newest run is missing: restore it from a copy of the run, or name"
    with pytest.raises(UserError, match=rf"^{re.escape(message)} another run \(older\)$"):
        find_run(None)
    (runs / "older" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"restore it from a copy of the run$"):
        find_run(None)


def test_the_first_run_is_suggested_if_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_as_project(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"no runs in .*: start one with `\./launch\.sh quickstart`"):
        find_run(None)


def test_settings_files_are_found_by_name_and_path(project: Path) -> None:
    small = project / "ds_configs" / "small.yaml"
    assert find_config("small") == find_config("small.yaml") == find_config(str(small)) == small
    assert find_config("ds_configs/small.yaml") == small


def test_an_unknown_settings_file_lists_the_shipped_ones(project: Path) -> None:
    with pytest.raises(
        UserError, match=r"config not found: smal \(did you mean small\?\); give .*, or one of large, small$"
    ):
        find_config("smal")
    with pytest.raises(UserError, match=r"runs is not a settings file; give the path"):
        find_config(str(project / "runs"))
    with pytest.raises(UserError, match=r"config not found: 99; give the path"):
        find_config("99")


def test_a_link_to_a_run_is_resolved_also_by_default(project: Path) -> None:
    link, target = project / "runs" / "newer", project / "elsewhere" / "newer"
    target.parent.mkdir()
    link.rename(target)
    (target / "config.yaml").write_text("run: {name: newer}\n")
    link.symlink_to(target)
    assert find_run(None) == find_run("newer") == target
