"""Copied, moved and renamed runs: their location counts, not the stored paths."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from project_dir import use_as_project

from ds_gpt2.checkpoint.output_check import check_outputs
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.output_owner import write_owner
from ds_gpt2.config.run_location import load_run_settings, stored_settings
from ds_gpt2.config.settings import PROJECT_DIR, Settings, dump_settings, load_settings, settings_of
from ds_gpt2.tools.report import diff
from ds_gpt2.training import run_start

Start = Callable[..., Settings]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project directory."""
    use_as_project(tmp_path / "project", monkeypatch)
    (tmp_path / "project" / "runs").mkdir(parents=True)
    return tmp_path / "project"


def use(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``project`` the project directory, which stored relative paths refer to."""
    real = settings_of
    use_as_project(project, monkeypatch)
    monkeypatch.setattr(run_location, "settings_of", lambda *given, **named: real(*given, **named, project_dir=project))


def start(project: Path, name: str = "a", run_dir: Path | None = None, old: bool = False, **paths: str) -> Settings:
    """Write the files of a run that was started and saved one checkpoint."""
    tree = {
        "run": {"name": name, "dir": str(run_dir or project / "runs")},
        "model": {"preset": "7M"},
        "data": {"dir": paths.get("data", "data/ds")},
        "schedule": {"steps": 1000},
        "checkpoint": {
            "dir": paths.get("checkpoints", str(project / "checkpoints")),
        },
        "monitor": {"dir": paths.get("monitor")},
        "deepspeed": str(project / "ds_configs" / "zero2_bf16.json"),
    }
    config = project / "settings.yaml"
    config.write_text(yaml.safe_dump(tree))
    settings = load_settings(config, project_dir=project)
    for directory in (*settings.output_dirs, *settings.shared_output_dirs):
        directory.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / "config.yaml").write_text(dump_settings(settings) if old else stored_settings(settings))
    line = {"time": "2026-01-01T00:00:00+0000"} | ({} if old else {"run_dir": str(settings.run_dir)})
    (settings.run_dir / "starts.jsonl").write_text(json.dumps(line) + "\n")
    save(settings.checkpoint_dir)
    if not old:
        for directory in settings.shared_output_dirs:
            write_owner(directory, settings.run_dir)
    return settings


def save(checkpoints: Path) -> None:
    (checkpoints / "rolling_step_000010").mkdir(parents=True)
    (checkpoints / "rolling_step_000010" / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty and must be a mapping of sections"),
        (b"\0\1\2", "is not a settings file: "),
        (b"run: \xff", "is not UTF-8 (byte 5): "),
        (b"run: [", "is not valid YAML: "),
        (b"word", "must be a mapping of sections (run:, model:, data:, ...): "),
        (None, ""),
    ],
)
def test_damaged_settings_of_a_run_are_to_be_restored(tmp_path: Path, content: bytes | None, what: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_run_settings(tmp_path)
    text = str(raised.value)
    assert what in text and text.endswith("restore it from a copy of the run") and str(tmp_path) in text


@pytest.mark.parametrize("old", [False, True], ids=["stored now", "stored by 0.1.0"])
def test_settings_of_an_unmoved_run_are_unchanged(project: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    use(project, monkeypatch)
    settings = start(project, old=old, monitor=str(project / "boards"))
    assert load_run_settings(settings.run_dir) == settings
    check_outputs(settings)


@pytest.mark.parametrize("old", [False, True], ids=["stored now", "stored by 0.1.0"])
@pytest.mark.parametrize("how", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_all_paths_of_a_copied_or_moved_project_are_inside_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[..., object], old: bool
) -> None:
    start(project, old=old, monitor=str(project / "boards"))
    other = tmp_path / "deep" / "other"
    other.parent.mkdir()
    (project / "data" / "ds").mkdir(parents=True)
    (project / "ds_configs").mkdir()
    (project / "ds_configs" / "zero2_bf16.json").write_text("{}")
    how(project, other)
    use(other, monkeypatch)
    settings = load_run_settings(other / "runs" / "a")
    for path in (*settings.output_dirs, *(source.dir for source in settings.data.sources), settings.deepspeed):
        assert path.is_relative_to(other), path
    check_outputs(settings)


@pytest.mark.parametrize("old", [False, True], ids=["stored now", "stored by 0.1.0"])
def test_a_run_outside_of_the_project_moves_with_its_siblings(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    use(project, monkeypatch)
    there = tmp_path / "scratch"
    outside = {"checkpoints": str(there / "checkpoints"), "data": str(there / "ds")}
    start(project, run_dir=there / "runs", old=old, **outside)
    (there / "ds").mkdir()
    shutil.copytree(there / "runs", tmp_path / "new" / "runs")
    shutil.copytree(there / "checkpoints", tmp_path / "new" / "checkpoints")
    settings = load_run_settings(tmp_path / "new" / "runs" / "a")
    assert settings.checkpoint_dir == tmp_path / "new" / "checkpoints" / "a"
    assert settings.data.dir == there / "ds"  # it was not copied: it is read where it is
    assert settings.deepspeed == project / "ds_configs" / "zero2_bf16.json"
    check_outputs(settings)
    shutil.move(there, tmp_path / "moved")
    settings = load_run_settings(tmp_path / "moved" / "runs" / "a")
    assert settings.data.dir == tmp_path / "moved" / "ds"


def test_a_run_that_moved_without_its_checkpoints_does_not_start_a_new_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(project, monkeypatch)
    there = tmp_path / "scratch"
    start(project, run_dir=there / "runs", checkpoints=str(there / "checkpoints"))
    shutil.move(there / "runs" / "a", tmp_path / "home" / "runs" / "a")
    settings = load_run_settings(tmp_path / "home" / "runs" / "a")
    message = f"no checkpoints in {tmp_path}/home/checkpoints/a, but it has some in {there}/checkpoints/a"
    with pytest.raises(UserError, match=rf"{message}: move .*, or set checkpoint.dir={there}/checkpoints$"):
        check_outputs(settings)
    there_again = load_run_settings(settings.run_dir, {"checkpoint.dir": str(there / "checkpoints")})
    check_outputs(there_again)


def test_a_checkpoint_of_an_unreadable_run_is_usable(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(project, monkeypatch)
    settings = start(project)
    (settings.run_dir / "config.yaml").write_text("run: [")
    assert run_location.run_of(settings.checkpoint_dir) is None
    stored = {"run": {"name": "a"}, "data": {"dir": "data/ds"}, "model": {"init_from": "owner/name"}}
    now = run_location.current_settings(settings.checkpoint_dir / "rolling_step_000010", stored)
    assert now["data"]["dir"] == str(project / "data" / "ds")
    assert now["model"]["init_from"] == "owner/name"
    assert "dir" not in now["run"]


def test_paths_in_the_run_move_with_it(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(project, monkeypatch)
    mine = tmp_path / "here" / "runs"
    settings = start(project, run_dir=mine, checkpoints=str(mine / "a" / "saved"))
    assert yaml.safe_load((settings.run_dir / "config.yaml").read_text())["checkpoint"]["dir"] == "$RUN_DIR/saved"
    os.rename(mine / "a", tmp_path / "b")
    assert load_run_settings(tmp_path / "b").checkpoint.dir == tmp_path / "b" / "saved"


def test_stored_settings_have_no_absolute_path_into_the_project(project: Path) -> None:
    settings = start(project)
    assert str(project) not in (settings.run_dir / "config.yaml").read_text()


def test_a_command_for_alerts_is_readable_by_its_owner_only(project: Path) -> None:
    settings = start(project)
    secret = settings.model_copy(update={"alerts": settings.alerts.model_copy(update={"command": "curl -u me:s3cr3t"})})
    run_location.write_settings(secret)
    file = secret.run_dir / "config.yaml"
    assert "s3cr3t" in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    public = run_location.public_tree(secret)
    assert public["alerts"]["command"] == "(not shown)" and "s3cr3t" not in str(public)
    assert run_location.public_tree(settings)["alerts"]["command"] is None
    earlier = run_location.portable_tree(secret)  # as earlier versions stored it with every checkpoint
    assert not any("alerts" in change for change in run_start.changed_settings(earlier, settings))
    assert list(diff.settings_that_differ(settings, secret)) == ["alerts.command"]
    assert "s3cr3t" not in str(diff.settings_that_differ(settings, secret))


def test_a_renamed_run_has_the_name_of_its_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(project, monkeypatch)
    start(project)
    os.rename(project / "runs" / "a", project / "runs" / "b")
    renamed = load_run_settings(project / "runs" / "b")
    assert renamed.run.name == "b"
    with pytest.raises(UserError, match=rf"no checkpoints in {project}/checkpoints/b, but it has some in .*/a: move"):
        check_outputs(renamed)
    os.rename(project / "checkpoints" / "a", project / "checkpoints" / "b")
    check_outputs(renamed)
    assert run_location.run_of(project / "checkpoints" / "b") == project / "runs" / "b"


def test_a_copy_of_a_run_within_a_project_needs_its_own_checkpoints(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(project, monkeypatch)
    start(project)
    shutil.copytree(project / "runs" / "a", project / "runs" / "b")
    with pytest.raises(UserError, match=rf"has some in .*/a: copy that directory to {project}/checkpoints/b$"):
        check_outputs(load_run_settings(project / "runs" / "b"))


@pytest.mark.parametrize("old", [False, True], ids=["stored now", "stored by 0.1.0"])
@pytest.mark.parametrize("shared", ["checkpoints", "monitor"])
def test_a_copy_that_shares_an_output_directory_is_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, old: bool
) -> None:
    paths: dict[str, Any] = {shared: str(tmp_path / "shared")}
    start(project, old=old, **paths)
    shutil.copytree(project, tmp_path / "copies" / "copy")
    use(tmp_path / "copies" / "copy", monkeypatch)
    with pytest.raises(UserError, match=rf"{tmp_path}/shared/a belongs to the run in {project}/runs/a") as refused:
        check_outputs(load_run_settings(tmp_path / "copies" / "copy" / "runs" / "a"))
    assert "\n" not in str(refused.value)
    shutil.rmtree(project)  # now it is a moved run
    check_outputs(load_run_settings(tmp_path / "copies" / "copy" / "runs" / "a"))


def test_two_runs_with_one_name_cannot_share_checkpoints(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(project, monkeypatch)
    first = start(project, checkpoints=str(tmp_path / "ck"))
    other = first.model_copy(update={"run": first.run.model_copy(update={"dir": tmp_path / "elsewhere"})})
    with pytest.raises(UserError, match=f"{tmp_path}/ck/a belongs to the run in {project}/runs/a"):
        check_outputs(other)


def test_the_checkpoint_directory_of_the_previous_start_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(project, monkeypatch)
    start(project, checkpoints=str(tmp_path / "ck"))
    here = load_run_settings(project / "runs" / "a", {"checkpoint.dir": str(tmp_path / "new")})
    with pytest.raises(UserError, match=rf"has some in {tmp_path}/ck/a: .*set checkpoint.dir={tmp_path}/ck$"):
        check_outputs(here)


def test_a_symbolic_link_to_a_run_works(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(project, monkeypatch)
    settings = start(project)
    (project / "runs" / "current").symlink_to("a")
    assert load_run_settings(project / "runs" / "current") == settings
    shutil.move(project / "runs" / "a", tmp_path / "on_another_disk")
    (project / "runs" / "a").symlink_to(tmp_path / "on_another_disk")
    assert load_run_settings(project / "runs" / "a").checkpoint_dir == settings.checkpoint_dir


def test_damaged_records_of_the_location_are_ignored(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(project, monkeypatch)
    settings = start(project)
    for content in (b"", b"\xff\xfe", b"[]\n", b"{}\n", b'{"run_dir": 5}\n', b"[" * 100_000 + b"\n"):
        (settings.run_dir / "starts.jsonl").write_bytes(content)
        (settings.checkpoint_dir / "run.json").write_bytes(content)
        assert load_run_settings(settings.run_dir) == settings
        check_outputs(settings)


def test_a_dollar_sign_in_the_path_of_a_run_is_not_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "cash $HOME"
    (project / "runs").mkdir(parents=True)
    use(project, monkeypatch)
    (tmp_path / "$outside").mkdir()
    settings = start(project, run_dir=tmp_path / "$outside" / "runs")
    assert load_run_settings(settings.run_dir) == settings


def test_relative_paths_refer_to_the_project(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {preset: 7M}\ndata: {dir: data/x}\nschedule: {steps: 800}\n")
    assert load_run_settings(tmp_path).data.dir == PROJECT_DIR / "data" / "x"
