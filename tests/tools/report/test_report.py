"""The report: what is read, summed up and drawn is what was recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_gpt2.monitoring.pace import Range
from ds_gpt2.run_dir.metrics import TIME
from ds_gpt2.tools.report import page
from ds_gpt2.tools.report.charts import Chart, charts_of, views_of
from ds_gpt2.tools.report.curves import EMPTY, Curve, mean_per_step, read_records, smoothed, thinned
from ds_gpt2.tools.report.page import RunSection, render
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import Prices, summarize

NOW = 1_800_000_000.0
HOUR = 3600.0

CONFIG = """
run: {name: NAME, dir: RUNS}
model: {preset: PRESET}
data: {dir: data}
batch: {tokens_per_step: 1024, micro_batch: 1}
schedule: {steps: 100, warmup_steps: 1}
checkpoint: {dir: CHECKPOINTS}
samples: {prompts: ["Say <b>"]}
"""

Write = Callable[..., Path]


def record(step: int, **more: Any) -> dict[str, Any]:
    """One step of 2 s, the newest of 40 at ``NOW``."""
    numbers = {"train/loss": 10 / step, "train/grad_norm": 1.0 + step, "train/tokens": 1024.0 * step}
    return {"step": step, "time": NOW - 2 * (40 - step), **numbers, "perf/step_ms": 2000.0, **more}


def start(at: float, from_step: int) -> dict[str, Any]:
    return {"time": time.strftime(TIME, time.localtime(at)), "from_step": from_step, "world_size": 2}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the files of a run; returns its directory."""

    def files(
        records: list[dict[str, Any]],
        starts: Sequence[dict[str, Any]] = (),
        name: str = "test",
        preset: str = "7M",
    ) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        config = CONFIG.replace("NAME", name).replace("PRESET", preset).replace("RUNS", str(tmp_path / "runs"))
        (directory / "config.yaml").write_text(config.replace("CHECKPOINTS", str(tmp_path / "checkpoints")))
        for file, lines in (("metrics.jsonl", records), ("starts.jsonl", starts)):
            (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    return files


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()
        self.figures = {figure["id"]: figure for figure in json.loads(self.scripts[1])}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def traces(self, number: int) -> dict[str, dict[str, Any]]:
        """Of one chart, by name."""
        return {trace["name"]: trace for trace in self.figures[f"chart-{number}"]["traces"]}


def shown(*directories: Path, now: float = NOW, since: float | None = None) -> Page:
    runs = [load_run(directory) for directory in directories]
    summaries = [summarize(run, now, since_seconds=since) for run in runs]
    if since is not None:
        runs = [run.since(now - since) for run in runs]
    parts = [RunSection(run, summary) for run, summary in zip(runs, summaries, strict=True)]
    views = views_of([(run.name, run.settings, run.records) for run in runs])
    return Page(render(parts, charts_of(views), now))


# Curves.


def test_thinning_keeps_every_extreme_and_the_newest_point() -> None:
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


def test_a_short_curve_is_not_thinned() -> None:
    curve = Curve(np.arange(2000), np.ones(2000))
    assert thinned(curve) is curve
    assert len(thinned(EMPTY)) == 0


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    curve = Curve(np.arange(1, 6), np.array([1.0, np.nan, 3.0, 5.0, np.nan]))
    np.testing.assert_array_equal(smoothed(curve, 2).values, [1.0, 1.0, 3.0, 4.0, 5.0])
    assert (
        Curve(np.arange(60), np.array([*[9.0] * 35, *[1.0] * 24, np.nan])).recent() == 9.0
    )  # 25 and 24 of the last 49
    assert Curve(np.arange(60), np.array([*[9.0] * 33, *[1.0] * 26, np.nan])).recent() == 1.0
    assert np.isnan(smoothed(Curve(np.array([1]), np.array([np.nan]))).values).all()


def test_costs_that_few_steps_bear_are_shared_out() -> None:
    steps = np.arange(1, 11)
    cost = mean_per_step(Curve(np.array([2, 5, 10]), np.array([10.0, 20.0, 5.0])), steps, stretches=2)
    assert (cost.steps.tolist(), cost.values.tolist()) == ([5, 10], [6.0, 1.0])


# Reading.


def test_damaged_lines_are_counted_and_a_line_being_written_is_not(tmp_path: Path) -> None:
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


def test_a_step_that_goes_back_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in (1, 3, 2, 4)))
    records = read_records(file)
    assert (records.steps.tolist(), records.damaged) == ([1, 3, 4], 1)


def test_times_that_are_missing_are_counted_back(write: Write) -> None:
    records = [record(step) for step in range(1, 6)]
    del records[1]["time"], records[2]["time"]
    records[3]["perf/eval_ms"] = 500.0  # between steps 3 and 4
    found = load_run(write(records)).records
    assert found.estimated == 2
    expected = [record(1)["time"], NOW - 76.5, NOW - 74.5, record(4)["time"], record(5)["time"]]
    assert found.times.tolist() == expected


def test_without_any_times_the_files_own_is_that_of_the_newest(write: Write) -> None:
    records = [record(step) for step in range(1, 4)]
    for each in records:
        del each["time"]
    directory = write(records)
    found = load_run(directory).records
    newest = (directory / "metrics.jsonl").stat().st_mtime
    assert found.times.tolist() == pytest.approx([newest - 4, newest - 2, newest])
    assert summarize(load_run(directory), newest, since_seconds=3.0).since.steps == 2


# Figures.


def test_the_figures_are_those_of_the_files(write: Write) -> None:
    records = [record(step) for step in range(1, 41)]
    records[9] |= {"val/loss": 3.5}
    records[29] |= {"val/loss": 3.0}
    records[39] |= {"val/loss": 3.25, "perf/goodput": 0.9}
    records[20]["train/loss"] = None
    summary = summarize(load_run(write(records)), NOW + 60)
    assert (summary.state, summary.step, summary.steps, summary.last_record_age_seconds) == ("running", 40, 100, 60.0)
    assert (summary.val_loss, summary.best_val_loss, summary.best_val_step) == (3.25, 3.0, 30)
    assert summary.loss == pytest.approx(10 / 20)  # the median of all but step 21
    assert (summary.not_finite_losses, summary.goodput, summary.tokens) == (1, 0.9, 40960.0)
    assert summary.seconds_per_step == Range(2.0, 2.0, 2.0)
    assert summary.seconds_left == Range(120.0, 120.0, 120.0)
    assert summary.finish == NOW + 180
    assert page.sentence(summary).startswith("Running: step 40 of 100 (40.0%), last record 1m ago. Loss 0.5000 (")
    assert "(median of last 50 steps), validation 3.2500 (best 3.0000 at step 30)" in page.sentence(summary)


def test_newest_losses_that_are_not_finite_come_first_in_the_sentence(write: Write) -> None:
    records = [record(step) for step in range(1, 11)]
    records[4] |= {"val/loss": 3.5}
    records[9] |= {"train/loss": None, "val/loss": None}
    sentence = page.sentence(summarize(load_run(write(records)), NOW))
    newest = (
        "The newest training loss is NaN or infinite (step 10), the newest validation loss is NaN or infinite (step 10)"
    )
    assert f". {newest}, loss " in sentence and "validation 3.5000" in sentence


STOPPED = {"kind": "stop", "text": "stopped on request"}
UNSAVED = {"kind": "save_failed", "text": "ended, but the last state could not be saved", "facts": {"ended": True}}
FAILED = {"kind": "save_failed", "text": "no checkpoint was saved"}


@pytest.mark.parametrize(
    ("newest", "age", "journal", "state"),
    [
        (100, 9e9, [], "finished"),
        (40, 599, [], "running"),
        (40, 601, [], "silent"),
        (40, 5, [STOPPED], "stopped"),
        (40, 5, [UNSAVED], "stopped"),
        (40, 5, [FAILED], "running"),
        (40, 5, [STOPPED, {"kind": "start", "text": "resumed"}], "running"),
    ],
)
def test_the_state_is_what_the_files_tell(
    write: Write, newest: int, age: float, journal: list[dict[str, Any]], state: str
) -> None:
    directory = write([record(step) for step in range(1, newest + 1)])
    (directory / "journal.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in journal))
    assert summarize(load_run(directory), record(newest)["time"] + age).state == state


def test_steps_follow_from_epochs(write: Write) -> None:
    directory = write([record(7, **{"train/epoch": 7 / 33.3})])
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("steps: 100,", "epochs: 3,"))
    assert load_run(directory).steps == 100  # 99.9, the last one filled up


def test_lost_time_is_what_lies_between_two_starts_that_count(write: Write) -> None:
    records = [record(step) for step in range(1, 41)]
    for each in records[20:]:
        each["time"] += HOUR
    gone = start(NOW - 60, 25)  # went on from step 25, all of which the next one did anew
    run = load_run(write(records, [start(NOW - 90, 0), gone, start(NOW - 50, 20)]))
    assert [each.lost_seconds for each in run.starts] == [None, None, HOUR]
    summary = summarize(run, NOW + HOUR)
    assert (summary.restarts, summary.resumes, summary.lost_seconds) == (0, 2, HOUR)  # nothing tells who made them
    assert summary.seconds_per_step == Range(2.0, 2.0, 2.0)  # the hour is no step's


def test_the_range_is_that_of_the_newest_windows(write: Write) -> None:
    """Eight stretches of a thousand steps."""
    records = [record(step, **{"perf/step_ms": 1000.0 * (1 + (step - 2) // 125)}) for step in range(1, 1002)]
    pace = summarize(load_run(write(records, [start(NOW - 9e4, 0)])), NOW).seconds_per_step
    assert pace == Range(4.5, pytest.approx(1.7), pytest.approx(7.3))  # numpy's linear percentiles of 1 to 8


def test_costs_by_hand(write: Write) -> None:
    records = [record(step, **{"perf/step_ms": 3.6e6}) for step in range(1, 41)]  # an hour a step, 60 left
    directory = write(records)
    assert summarize(load_run(directory), NOW).cost is None
    cost = summarize(load_run(directory), NOW, Prices(watts=2000, per_kwh=0.25, per_hour=8)).cost
    assert cost is not None
    assert (cost.watts, cost.watts_recorded) == (2000, False)
    assert cost.energy_kwh is not None and cost.energy_money is not None and cost.hours_money is not None
    assert cost.energy_kwh.mean == pytest.approx(60 * 2)
    assert cost.energy_money.mean == pytest.approx(60 * 2 * 0.25)
    assert cost.hours_money.high == pytest.approx(60 * 8)


def test_recorded_power_is_used_where_none_is_given(write: Write) -> None:
    records = [record(step) for step in range(1, 41)]
    records[10]["perf/gpu_power_w"], records[30]["perf/gpu_power_w"] = 900.0, 1100.0
    cost = summarize(load_run(write(records)), NOW).cost
    assert cost is not None and (cost.watts, cost.watts_recorded, cost.energy_money) == (1000.0, True, None)
    assert cost.energy_kwh == Range(*[pytest.approx(120 / 3600)] * 3)


def test_a_window_has_its_own_figures(write: Write) -> None:
    records = [record(step) for step in range(1, 41)]
    records[9]["val/loss"], records[35]["val/loss"], records[38]["val/loss"] = 1.0, 4.0, 5.0
    records[33]["train/grad_norm"] = 99.0
    directory = write(records, [start(NOW - 80, 0), start(NOW - 15, 32)])
    since = summarize(load_run(directory), NOW, since_seconds=19).since  # steps 31 to 40
    assert since is not None
    assert (since.steps, since.starts) == (10, 1)
    assert since.loss_before == pytest.approx((10 / 15 + 10 / 16) / 2)
    assert since.loss_now == summarize(load_run(directory), NOW).loss == pytest.approx((10 / 20 + 10 / 21) / 2)
    assert (since.best_val_loss, since.best_val_step) == (4.0, 36)
    assert (since.worst_grad_norm, since.worst_grad_norm_step) == (99.0, 34)
    nothing = summarize(load_run(directory), NOW + 9999, since_seconds=60).since
    assert nothing is not None and (nothing.steps, nothing.loss_now, nothing.worst_grad_norm) == (0, None, None)


# The page.


def test_the_traces_are_the_records(write: Write) -> None:
    records = [record(step, **{"train/lr": 1e-4 * step, "perf/goodput": 0.5}) for step in range(1, 41)]
    records[4]["train/loss"] = None
    records[19] |= {"val/loss": 2.5, "hellaswag/acc_norm": 0.3, "hellaswag/acc_norm_stderr": 0.01}
    found = shown(write(records))
    loss = found.traces(0)
    assert loss["train"]["x"] == list(range(1, 41))
    assert loss["train"]["y"] == [each["train/loss"] for each in records]
    assert loss["train"]["customdata"] == [1024 * step for step in range(1, 41)]
    assert (loss["validation"]["x"], loss["validation"]["y"]) == ([20], [2.5])
    assert found.traces(1)["norm"]["y"] == [each["train/grad_norm"] for each in records]
    assert found.traces(2)["test"]["y"] == [each["train/lr"] for each in records]
    hellaswag = found.traces(3)
    assert (hellaswag["low"]["y"], hellaswag["acc_norm"]["y"], hellaswag["high"]["y"]) == ([0.29], [0.3], [0.31])


def test_a_spike_is_within_the_picture_and_the_descent_above_it(write: Write) -> None:
    records = [record(step) for step in range(1, 41)]
    records[30]["train/loss"] = 9.0
    low, high = shown(write(records)).figures["chart-0"]["layout"]["yaxis"]["range"]
    assert low < 10 / 40
    assert 9.0 < high < 10.0


def test_the_reference_is_drawn_beside_its_likes_only(write: Write) -> None:
    records = [record(step, **{"hellaswag/acc_norm": 0.29}) for step in (100, 5000)]
    like = write(records, name="like", preset="124M")
    config = like / "config.yaml"
    config.write_text(config.read_text().replace("tokens_per_step: 1024", "tokens_per_step: 524288"))
    found = shown(like)
    reference = found.traces(0)["llm.c 124M on FineWeb"]
    assert (reference["x"], reference["y"]) == ([2000, 4000], [3.859, 3.618])
    marks = [mark["text"] for mark in found.figures["chart-3"]["layout"]["annotations"]]
    assert marks == ["OpenAI GPT-2 124M 29.45%", "llm.c 124M 29.90%"]
    other = shown(write(records, name="other"))
    assert "llm.c 124M on FineWeb" not in other.traces(0)
    assert "annotations" not in other.figures["chart-3"]["layout"]


def test_a_window_draws_its_steps_only(write: Write) -> None:
    records = [record(step, **{"samples/0": f"text {step}"}) for step in range(1, 41)]
    found = shown(write(records, [start(NOW - 80, 0), start(NOW - 15, 32)]), since=19)
    assert found.traces(0)["train"]["x"] == list(range(31, 41))
    assert "text 31" in found.text
    assert "text 30" not in found.text
    assert "The last 19s" in found.text


def test_text_from_files_is_shown_and_never_run(write: Write) -> None:
    evil = "</pre></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
    directory = write([record(1, **{"samples/0": evil, "samples/7": evil})], [{**start(NOW, 0), "git_commit": "<i>"}])
    (directory / "NOTES.md").write_text(evil)
    line = {"time": NOW, "step": 1, "kind": evil, "text": evil}
    (directory / "journal.jsonl").write_text(json.dumps(line) + "\n")
    found = shown(directory)
    assert found.text.count(evil) == 5
    assert "Say <b>" in found.text
    assert len(found.scripts) == 3
    assert {tag for tag, _ in found.tags} & {"img", "i", "b"} == set()
    assert not any("onerror" in attributes for _, attributes in found.tags)


def test_no_name_of_a_curve_ends_the_script(write: Write) -> None:
    run = load_run(write([]))
    name = "</script><b>bold</b>"
    found = Page(render([RunSection(run, summarize(run, NOW))], [Chart(name, [{"name": name}])], NOW))
    assert list(found.traces(0)) == [name]
    assert "b" not in {tag for tag, _ in found.tags}


def test_the_browser_loads_nothing_and_is_forbidden_to(write: Write) -> None:
    found = shown(write([record(step) for step in range(1, 41)]))
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in found.tags)
    assert {tag for tag, _ in found.tags} & {"link", "iframe", "object", "base"} == set()
    policies = [each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [page._POLICY]
    assert policies[0].startswith("default-src 'none';") and "http" not in policies[0] and "*" not in policies[0]
    assert any(tag == "meta" and each.get("name") == "viewport" for tag, each in found.tags)
    drawn = {each["id"] for tag, each in found.tags if each.get("class") == "chart"}
    assert drawn == set(found.figures)


def test_several_runs_lie_over_each_other(write: Write) -> None:
    first = write([record(step, **{"val/loss": 3.0}) for step in range(1, 41)], name="first")
    second = write([record(step, **{"val/loss": 2.0}) for step in range(1, 11)], name="second")
    found = shown(first, second)
    loss = found.traces(0)
    assert list(loss) == ["first", "first: validation", "second", "second: validation"]
    assert loss["second"]["x"] == list(range(1, 11))
    assert (loss["first: validation"]["y"][0], loss["second: validation"]["y"][0]) == (3.0, 2.0)
    assert loss["first"]["line"]["color"] == loss["first: validation"]["line"]["color"]
    assert loss["first"]["line"]["color"] != loss["second"]["line"]["color"]
    assert "firstsecond" in found.text  # the head of the table
    assert "best validation loss3.0000 at step 12.0000 at step 1" in found.text
    assert "ms a step, by phase: second" in found.text


def test_what_is_not_configured_is_not_announced(write: Write) -> None:
    """No "no data yet" for what the run will never have."""
    directory = write([record(step) for step in range(1, 41)])
    config = directory / "config.yaml"
    assert "HellaSwag" not in shown(directory).text.replace("hellaswag", "")
    assert "What it writes" in shown(directory).text
    text = config.read_text()
    config.write_text(text.replace("samples: {", "samples: {every: 0, "))
    found = shown(directory)
    assert "What it writes" not in found.text and "Notes" not in found.text
    config.write_text(text + "hellaswag: {every: 10}\n")
    assert "HellaSwagno data yet" in "".join(shown(directory).text.split("\n"))
    config.write_text(text)
    other = write([record(step, **{"hellaswag/acc_norm": 0.3}) for step in range(1, 41)], name="other")
    assert "HellaSwag" in shown(directory, other).text  # one of them has it


def journal(directory: Path, *events: tuple[str, float, int, dict[str, Any]]) -> None:
    lines = [
        {"time": NOW - ago, "kind": kind, "step": step, "text": f"{kind} at {step}", "facts": facts}
        for kind, ago, step, facts in events
    ]
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_restarts_and_lost_time_are_those_of_the_journal(write: Write) -> None:
    """A crash that the supervisor got around, and a pause that somebody wanted."""
    directory = write(
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
    run = load_run(directory)
    summary = summarize(run, NOW)
    assert (summary.restarts, summary.resumes) == (1, 1)
    assert summary.lost_seconds == pytest.approx(150)
    assert [each.restart for each in run.starts] == [False, True, False]
    assert [each.lost_seconds for each in run.starts] == [None, pytest.approx(150), None]
    found = "".join(shown(directory).text.split("\n"))
    assert "restarts by the supervisor1" in found and "resumes by hand1" in found and "time lost2m 30s" in found
    assert "crash at 12" in found
    assert "save at 20" not in found and "launch at 20" not in found  # nothing that has gone wrong


def test_a_run_without_records_says_so(write: Write) -> None:
    found = shown(write([]))
    assert found.figures == {}
    assert "No data yet: nothing is recorded." in found.text
    assert found.text.count("no data yet") >= 7


def test_samples_are_the_newest_and_some_between() -> None:
    assert page._spread(list(range(1000, 0, -10)), 5) == [1000, 750, 500, 260, 10]
    assert page._spread([3, 2], 5) == [3, 2]
