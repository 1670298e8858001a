"""What the log says about a resume."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.manifest import Manifest
from ds_gpt2.checkpoint.resume import Restored
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.run_location import public_tree
from ds_gpt2.config.settings import ScheduleSettings, Settings, settings_of
from ds_gpt2.run_dir.fork_record import Fork
from ds_gpt2.training.run_start import Origin, log_resume, start_text


def settings_with(folder: Path, schedule: dict[str, object]) -> Settings:
    tree = {"model": {"preset": "7M"}, "data": {"dir": str(folder)}, "schedule": schedule}
    return settings_of(tree, folder / "run.yaml")


def restored(folder: Path, step: int, settings: dict[str, object]) -> Restored:
    """Return a checkpoint that was saved with ``settings``."""
    manifest = Manifest(
        created="2026-01-01",
        epoch=0.0,
        state={"step": step},
        world_size=1,
        identity={},
        settings=settings,
        versions={},
        files={},
    )
    return Restored(Generation(folder / "rolling_step_000600", "rolling", manifest, None), manifest, {})


def logged(caplog: pytest.LogCaptureFixture, found: Restored, settings: Settings) -> list[str]:
    with caplog.at_level(logging.INFO):
        log_resume(Origin(found), settings, windows=1000, windows_per_step=10)
    return [record.getMessage() for record in caplog.records]


def test_a_resume_with_more_steps_shows_the_new_learning_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = settings_with(tmp_path, {"epochs": 10})
    lines = logged(caplog, restored(tmp_path, 900, public_tree(before)), settings_with(tmp_path, {"steps": 2000}))
    assert lines[0].endswith("step 900 of 2,000")
    rate = next(line for line in lines if line.startswith("learning rate: "))
    assert (
        "0.000211 at step 900; now 0.000573 at step 901 (was 0.000208)" in rate and "(was 6e-05 at step 1,000)" in rate
    )
    assert lines[-1].endswith("steps 1 to 2,000; ^ resumes here; . before, + now, * both")


def test_a_resume_with_the_same_schedule_shows_no_plot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_with(tmp_path, {"steps": 1000})
    assert len(logged(caplog, restored(tmp_path, 900, public_tree(settings)), settings)) == 1


def test_settings_of_an_earlier_version_have_the_cosine_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(tmp_path, {"steps": 1000})
    tree = public_tree(settings)
    new = set(ScheduleSettings.model_fields) - {"steps", "epochs", "warmup_steps", "max_lr", "min_lr"}
    tree["schedule"] = {name: value for name, value in tree["schedule"].items() if name not in new}
    assert len(logged(caplog, restored(tmp_path, 900, tree), settings)) == 1


def test_a_schedule_that_this_version_does_not_know_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(tmp_path, {"steps": 1000})
    tree = {**public_tree(settings), "schedule": {"steps": 1000, "shape": "of another version"}}
    assert not any("learning rate" in line for line in logged(caplog, restored(tmp_path, 900, tree), settings))


def test_only_the_first_start_of_a_fork_names_its_parent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_with(tmp_path / "runs" / "data", {"steps": 1000})
    tree = {**public_tree(settings), "run": {"name": "base", "seed": 1}, "data": {"dir": "$RUN_DIR/../data"}}
    found = restored(tmp_path, 600, tree)
    fork = Fork("base", str(tmp_path / "runs" / "base"), "rolling_step_000600", 600, "")
    plan = plan_batch(2048, 1, 1024, 2)
    first, later = (Origin(found, fork, is_first=is_first) for is_first in (True, False))
    assert start_text(plan, first).startswith("forked from base at step 600 (rolling_step_000600), ")
    assert start_text(plan, later).startswith("resumed from rolling_step_000600, ")
    with caplog.at_level(logging.INFO):
        log_resume(first, settings, windows=1000, windows_per_step=10)
    lines = [record.getMessage() for record in caplog.records]
    assert f"forked from base at step 600; rolling_step_000600 of {tmp_path}/runs/base" in lines
    assert [line for line in lines if line.startswith("other than")] == ["other than in base: run.seed 1 -> 1337"]
