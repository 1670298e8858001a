"""Figures of a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from report_files import HOUR, NOW, WriteRun, beat, journal, record, rendered, start

from ds_gpt2.monitoring.pace import Range
from ds_gpt2.tools.report import page
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import summarize
from ds_gpt2.tools.resources.prices import Prices
from ds_gpt2.tools.status.status import read_status


def near(value: float) -> Any:
    return pytest.approx(value)


def test_figures_follow_from_the_records(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 41)]
    records[9] |= {"val/loss": 3.5}
    records[29] |= {"val/loss": 3.0}
    records[39] |= {"val/loss": 3.25, "perf/goodput": 0.9}
    records[20]["train/loss"] = None
    directory = write_run(records)
    beat(directory, NOW + 60)
    summary = summarize(load_run(directory), NOW + 60)
    assert (summary.state, summary.step, summary.steps, summary.last_record_age_seconds) == ("running", 40, 100, 60.0)
    assert (summary.val_loss, summary.best_val_loss, summary.best_val_step) == (3.25, 3.0, 30)
    assert summary.loss == pytest.approx(10 / 20)  # the median of all but step 21
    assert (summary.not_finite_losses, summary.goodput, summary.tokens) == (1, 0.9, 40960.0)
    assert summary.seconds_per_step == Range(2.0, 2.0, 2.0)
    assert summary.seconds_left == Range(120.0, 120.0, 120.0)
    assert summary.finish == NOW + 180
    assert page.sentence(summary).startswith("Running: step 40 of 100 (40.0%), last record 1m ago. Loss 0.5000 (")
    assert "(median of last 50 steps), validation 3.2500 (best 3.0000 at step 30)" in page.sentence(summary)


def test_lost_time_without_a_journal_follows_from_the_records(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 41)]
    for each in records[20:]:
        each["time"] += HOUR
    repeated = start(NOW - 60, 25)  # the next start repeats all its steps
    run = load_run(write_run(records, [start(NOW - 90, 0), repeated, start(NOW - 50, 20)]))
    assert [each.lost_seconds for each in run.starts] == [None, None, HOUR]
    summary = summarize(run, NOW + HOUR)
    assert (summary.restarts, summary.resumes, summary.lost_seconds) == (0, 2, HOUR)  # not known who made them
    assert summary.seconds_per_step == Range(2.0, 2.0, 2.0)  # without the hour of the interruption


def test_range_follows_from_the_newest_windows(write_run: WriteRun) -> None:
    """The window of 1,000 steps has eight sections."""
    records = [record(step, **{"perf/step_ms": 1000.0 * (1 + (step - 2) // 125)}) for step in range(1, 1002)]
    pace = summarize(load_run(write_run(records, [start(NOW - 9e4, 0)])), NOW).seconds_per_step
    assert pace == Range(4.5, near(1.7), near(7.3))  # linear percentiles of 1 to 8


def test_costs_follow_from_power_and_prices(write_run: WriteRun) -> None:
    records = [record(step, **{"perf/step_ms": 3.6e6}) for step in range(1, 41)]  # an hour per step, 60 steps left
    directory = write_run(records)
    assert summarize(load_run(directory), NOW).cost is None
    cost = summarize(load_run(directory), NOW, Prices(watts=2000, per_kwh=0.25, per_hour=8)).cost
    assert cost is not None
    assert (cost.watts, cost.watts_recorded) == (2000, False)
    assert cost.energy_kwh is not None and cost.energy_money is not None and cost.hours_money is not None
    assert cost.energy_kwh.mean == pytest.approx(60 * 2)
    assert cost.energy_money.mean == pytest.approx(60 * 2 * 0.25)
    assert cost.hours_money.high == pytest.approx(60 * 8)


def test_recorded_power_is_the_default(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 41)]
    records[10]["perf/gpu_power_w"], records[30]["perf/gpu_power_w"] = 900.0, 1100.0
    cost = summarize(load_run(write_run(records)), NOW).cost
    assert cost is not None and (cost.watts, cost.watts_recorded, cost.energy_money) == (1000.0, True, None)
    assert cost.energy_kwh == Range(*[near(120 / 3600)] * 3)


def test_time_window_has_its_own_figures(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 41)]
    records[9]["val/loss"], records[35]["val/loss"], records[38]["val/loss"] = 1.0, 4.0, 5.0
    records[33]["train/grad_norm"] = 99.0
    directory = write_run(records, [start(NOW - 80, 0), start(NOW - 15, 32)])
    since = summarize(load_run(directory), NOW, since_seconds=19).since  # steps 31 to 40
    assert since is not None
    assert (since.steps, since.starts) == (10, 1)
    assert since.loss_before == pytest.approx((10 / 15 + 10 / 16) / 2)
    assert since.loss_now == summarize(load_run(directory), NOW).loss == pytest.approx((10 / 20 + 10 / 21) / 2)
    assert (since.best_val_loss, since.best_val_step) == (4.0, 36)
    assert (since.worst_grad_norm, since.worst_grad_norm_step) == (99.0, 34)
    nothing = summarize(load_run(directory), NOW + 9999, since_seconds=60).since
    assert nothing is not None and (nothing.steps, nothing.loss_now, nothing.worst_grad_norm) == (0, None, None)


def test_restarts_and_lost_time_follow_from_the_journal(write_run: WriteRun) -> None:
    """A restart after a crash, and a resume after a stop."""
    directory = write_run(
        [record(step) for step in range(1, 41)],
        [start(NOW - ago, step) for ago, step in ((900, 0), (700, 10), (100, 20))],
    )
    journal(
        directory,
        ("launch", 910, 0, {"restart": False}), ("start", 900, 0, {}), ("save", 850, 10, {"taken": NOW - 850}),
        ("crash", 800, 12, {}), ("restart", 790, 12, {}),
        ("launch", 780, 12, {"restart": True}), ("start", 700, 10, {}),
        ("save", 600, 20, {"taken": NOW - 600}), ("stop", 599, 20, {}),
        ("launch", 110, 20, {"restart": False}), ("start", 100, 20, {}),
    )  # fmt: skip
    beat(directory)
    run = load_run(directory)
    summary = summarize(run, NOW)
    assert (summary.restarts, summary.resumes) == (1, 1)
    assert summary.lost_seconds == pytest.approx(150)
    assert [each.restart for each in run.starts] == [False, True, False]
    assert [each.lost_seconds for each in run.starts] == [None, pytest.approx(150), None]
    found = "".join(rendered(directory).text.split("\n"))
    assert "restarts by the supervisor1" in found and "resumes by hand1" in found and "time lost2m 30s" in found
    assert "crash at 12" in found
    assert "save at 20" not in found and "launch at 20" not in found  # routine events


STOPPED = {"kind": "stop", "text": "stopped on request"}
DONE = {"kind": "done", "text": "finished"}
STARTED = {"kind": "start", "text": "resumed"}


@pytest.mark.parametrize(
    ("is_running", "journal", "state"),
    [
        (False, [STARTED, DONE], "finished"),
        (True, [STARTED], "running"),
        (False, [STARTED], "dead"),
        (False, [], "dead"),
        (False, [STARTED, STOPPED], "stopped"),
        (True, [STARTED, STOPPED, STARTED], "running"),
        (False, [STARTED, STOPPED, STARTED], "dead"),
    ],
)
def test_state_is_that_of_status(
    write_run: WriteRun, is_running: bool, journal: list[dict[str, Any]], state: str
) -> None:
    directory = write_run([record(step) for step in range(1, 41)])
    (directory / "journal.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in journal))
    if is_running:
        beat(directory)
    summary = summarize(load_run(directory), NOW + 5)
    assert summary.state == read_status(directory, NOW + 5).state == state
    assert (summary.finish is not None) == is_running
