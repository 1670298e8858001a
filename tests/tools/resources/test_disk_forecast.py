"""Forecast of free disk space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from run_files import CONFIG, DAY, RunFiles, set_free_bytes

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.config.settings import load_settings
from ds_gpt2.tools.resources import disk_forecast
from ds_gpt2.tools.resources.disk_forecast import RunProgress
from ds_gpt2.tools.status.screen import screen


def test_forecast_reports_a_disk_that_becomes_full(healthy_run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of ten seconds are left, with ten saves. The forecast includes the checkpoint being written."""
    settings = load_settings(healthy_run.run_dir / "config.yaml")
    written = sum(file.stat().st_size for file in healthy_run.run_dir.rglob("*") if file.is_file())
    checkpoint = sum(file.stat().st_size for file in (healthy_run.folder / "checkpoints").rglob("*") if file.is_file())
    needed = written + 11 * 1000 - checkpoint + 1000  # logs; ten and the best, minus the existing one; the next one
    progress = RunProgress(1000, 2000, 10.0, 0.0)
    for free, enough in ((needed, True), (needed - 2, False)):
        set_free_bytes(free, monkeypatch)
        (found,) = disk_forecast.forecast_disks(healthy_run.run_dir, settings, scan(settings.checkpoint_dir), progress)
        assert (found.free_bytes, found.needed_bytes) == (free, pytest.approx(needed, abs=1))
        assert (found.days_left is None) is enough
    assert found.days_left == pytest.approx(1000 * 10 / DAY, rel=0.01)
    assert "0.1 days left, 0.1 MB free" in screen(healthy_run.status())
    assert healthy_run.problems() == [
        f"the disk of {healthy_run.run_dir} lasts 0.1 days at the run's write rate: 0.1 MB free"
    ]
    healthy_run.configure(CONFIG + "alerts: {disk_days: 0.1}\n")
    assert healthy_run.status().healthy
    set_free_bytes(10**12, monkeypatch)
    assert "disk        enough to the end, 1.00 TB free" in screen(healthy_run.status())


def test_only_free_space_is_known_before_the_first_checkpoint(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.train(50)
    files.beat(step=51)
    set_free_bytes(10**9, monkeypatch)
    (found,) = files.status().disks
    assert (found.free_bytes, found.needed_bytes, found.days_left) == (10**9, None, None)


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"keep_last": 3}, 3 + 1 + 1),
        ({"keep_last": 30}, 11 + 1 + 1),  # one checkpoint exists, ten more saves
        ({"keep_last": 3, "keep_best": False}, 3 + 1),
        ({"keep_last": 3, "keep_every": 500}, 3 + 4 + 1 + 1),
        ({"keep_last": 3, "keep_every": 150}, 3 + 6 + 1 + 1),  # at multiples of 300
        ({"keep_last": 3, "every": 0}, 2 + 1 + 1),  # one save at the end
    ],
)
def test_checkpoints_grow_until_retention_deletes_them(
    healthy_run: RunFiles, changes: dict[str, Any], checkpoints: int
) -> None:
    settings = load_settings(healthy_run.run_dir / "config.yaml").checkpoint.model_copy(update=changes)
    found = scan(healthy_run.folder / "checkpoints" / "test")
    growth = disk_forecast.growth_of_checkpoints(settings, found, 1000, 0, RunProgress(1000, 2000, 10.0, 0.0))
    assert growth(2000) == 1000 * checkpoints
    assert growth(1000) <= growth(1500) <= growth(2000)
    with_surplus = disk_forecast.growth_of_checkpoints(settings, found, 1000, 10**9, RunProgress(1000, 2000, 10.0, 0.0))
    assert with_surplus(2000) == 1000  # the checkpoint that is written before others are deleted


def test_epoch_checkpoints_are_included(healthy_run: RunFiles) -> None:
    settings = load_settings(healthy_run.run_dir / "config.yaml").checkpoint
    found, progress = scan(healthy_run.folder / "checkpoints" / "test"), RunProgress(1000, 2000, 10.0, 1 / 300)
    plain = disk_forecast.growth_of_checkpoints(settings, found, 1400, 0, replace(progress, epochs_per_step=0.0))(2000)
    for changes, more in (({}, 3 * 1400), ({"keep_epochs": 2}, 2 * 1400), ({"epochs_as": "weights"}, 3 * 400)):
        growth = disk_forecast.growth_of_checkpoints(settings.model_copy(update=changes), found, 1400, 0, progress)
        assert growth(2000) - plain == pytest.approx(more)


def test_weights_alone_are_larger_with_a_moving_average(healthy_run: RunFiles) -> None:
    """8 of 18 bytes per parameter instead of 4 of 14."""
    settings = load_settings(healthy_run.run_dir / "config.yaml").checkpoint.model_copy(update={"epochs_as": "weights"})
    averaged = {"settings": {"ema": {"decay": 0.9}}}
    found = [
        replace(one, manifest=one.manifest.model_copy(update=averaged))
        for one in scan(healthy_run.folder / "checkpoints" / "test")
        if one.manifest is not None
    ]
    progress = RunProgress(1000, 2000, 10.0, 1 / 300)
    without_epochs = replace(progress, epochs_per_step=0.0)
    growths = [disk_forecast.growth_of_checkpoints(settings, found, 1800, 0, at) for at in (progress, without_epochs)]
    assert growths[0](2000) - growths[1](2000) == pytest.approx(3 * 800)


def test_finished_run_needs_no_space(healthy_run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a further checkpoint nor the reserve of a save is required."""
    healthy_run.configure(CONFIG.replace("min_free_gb: 0", "min_free_gb: 1"))
    settings, found = load_settings(healthy_run.run_dir / "config.yaml"), scan(healthy_run.folder / "checkpoints/test")
    set_free_bytes(10, monkeypatch)
    for step, needed in ((1999, True), (2000, False)):
        (disk,) = disk_forecast.forecast_disks(healthy_run.run_dir, settings, found, RunProgress(step, 2000, 10.0, 0.0))
        assert disk.needed_bytes is not None
        assert (disk.needed_bytes > 10**9, disk.days_left is not None) == (needed, needed)
    assert disk.needed_bytes == 0
