"""Reading, smoothing and thinning of curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_files import NOW, WriteRun, record

from ds_gpt2.tools.report.curves import EMPTY, Curve, mean_per_step, read_records, smoothed, thinned
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import summarize


def test_thinned_keeps_extremes_and_the_newest_point() -> None:
    values = np.random.default_rng(0).normal(size=95_000)
    spikes = {70: 50.0, 40_000: 90.0, 40_001: -80.0, 94_990: 70.0}
    values[list(spikes)] = list(spikes.values())
    values[60_000] = np.nan
    curve = Curve(np.arange(1, 95_001), values)
    kept = thinned(curve)
    assert len(kept) <= 2001
    assert set(spikes) <= set(kept.steps - 1)
    assert 60_001 in kept.steps
    assert kept.steps[-1] == 95_000
    np.testing.assert_array_equal(kept.values, values[kept.steps - 1])
    assert (np.diff(kept.steps) > 0).all()


def test_thinned_returns_a_short_curve_unchanged() -> None:
    curve = Curve(np.arange(2000), np.ones(2000))
    assert thinned(curve) is curve
    assert len(thinned(EMPTY)) == 0


def test_smoothed_skips_values_that_are_not_finite() -> None:
    curve = Curve(np.arange(1, 6), np.array([1.0, np.nan, 3.0, 5.0, np.nan]))
    np.testing.assert_array_equal(smoothed(curve, 2).values, [1.0, 1.0, 3.0, 4.0, 5.0])
    assert (
        Curve(np.arange(60), np.array([*[9.0] * 35, *[1.0] * 24, np.nan])).recent() == 9.0
    )  # 25 and 24 of the last 49
    assert Curve(np.arange(60), np.array([*[9.0] * 33, *[1.0] * 26, np.nan])).recent() == 1.0
    assert np.isnan(smoothed(Curve(np.array([1]), np.array([np.nan]))).values).all()


def test_mean_per_step_distributes_costs_over_all_steps() -> None:
    steps = np.arange(1, 11)
    cost = mean_per_step(Curve(np.array([2, 5, 10]), np.array([10.0, 20.0, 5.0])), steps, sections=2)
    assert (cost.steps.tolist(), cost.values.tolist()) == ([5, 10], [6.0, 1.0])


def test_damaged_lines_are_counted_but_not_an_incomplete_last_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "train/loss": 5}',
        '{"step": 2, "train',
        "[]",
        '{"step": 3, "train/loss": null}',
        '{"step": 4',
    ]
    file.write_text("\n".join(lines))
    records = read_records(file)
    assert records.steps.tolist() == [1, 3]
    assert records.damaged == 2
    np.testing.assert_array_equal(records.curve("train/loss").values, [5.0, np.nan])
    assert len(read_records(tmp_path / "none.jsonl").steps) == 0


def test_step_out_of_order_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in (1, 3, 2, 4)))
    records = read_records(file)
    assert (records.steps.tolist(), records.damaged) == ([1, 3, 4], 1)


def test_missing_times_are_computed_from_later_ones(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 6)]
    del records[1]["time"], records[2]["time"]
    records[3]["perf/eval_ms"] = 500.0  # between steps 3 and 4
    found = load_run(write_run(records)).records
    assert found.estimated == 2
    expected = [record(1)["time"], NOW - 76.5, NOW - 74.5, record(4)["time"], record(5)["time"]]
    assert found.times.tolist() == expected


def test_modification_time_is_the_time_of_the_newest_record_without_times(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 4)]
    for each in records:
        del each["time"]
    directory = write_run(records)
    found = load_run(directory).records
    newest = (directory / "metrics.jsonl").stat().st_mtime
    assert found.times.tolist() == pytest.approx([newest - 4, newest - 2, newest])
    since = summarize(load_run(directory), newest, since_seconds=3.0).since
    assert since is not None and since.steps == 2
