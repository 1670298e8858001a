"""Charts of the report."""

from __future__ import annotations

from report_files import NOW, WriteRun, record, rendered, start


def test_traces_contain_the_records(write_run: WriteRun) -> None:
    records = [record(step, **{"train/lr": 1e-4 * step, "perf/goodput": 0.5}) for step in range(1, 41)]
    records[4]["train/loss"] = None
    records[19] |= {"val/loss": 2.5, "val/loss_ema": 2.75, "hellaswag/acc_norm": 0.3, "hellaswag/acc_norm_stderr": 0.01}
    found = rendered(write_run(records))
    loss = found.traces(0)
    assert loss["train"]["x"] == list(range(1, 41))
    assert loss["train"]["y"] == [each["train/loss"] for each in records]
    assert loss["train"]["customdata"] == [1024 * step for step in range(1, 41)]
    assert (loss["validation"]["x"], loss["validation"]["y"]) == ([20], [2.5])
    averaged = loss["validation, averaged weights"]
    assert (averaged["x"], averaged["y"]) == ([20], [2.75])
    assert found.traces(1)["norm"]["y"] == [each["train/grad_norm"] for each in records]
    assert found.traces(2)["test"]["y"] == [each["train/lr"] for each in records]
    hellaswag = found.traces(3)
    assert (hellaswag["low"]["y"], hellaswag["acc_norm"]["y"], hellaswag["high"]["y"]) == ([0.29], [0.3], [0.31])


def test_sources_and_evaluations_have_a_curve_each(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 21)]
    records[9] |= {"val/web/loss": 3.0, "val/code/loss": 2.0, "eval/copa/acc": 0.5, "eval/copa/acc_stderr": 0.1}
    records[19] |= {"val/web/loss": 2.5, "val/code/loss": None}
    one = rendered(write_run(records, name="one"))
    sources, accuracy = one.traces(3), one.traces(4)
    assert (sources["web"]["x"], sources["web"]["y"], sources["code"]["y"]) == ([10, 20], [3.0, 2.5], [2.0, None])
    assert list(accuracy) == ["copa"] and accuracy["copa"]["y"] == [0.5]
    two = rendered(write_run(records, name="two"), write_run(records, name="three"))
    assert list(two.traces(3)) == ["two: code", "two: web", "three: code", "three: web"]


def test_visible_range_contains_spikes_but_not_the_initial_descent(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 41)]
    records[30]["train/loss"] = 9.0
    low, high = rendered(write_run(records)).figures["chart-0"]["layout"]["yaxis"]["range"]
    assert low < 10 / 40
    assert 9.0 < high < 10.0


def test_reference_is_drawn_for_comparable_runs_only(write_run: WriteRun) -> None:
    records = [record(step, **{"hellaswag/acc_norm": 0.29}) for step in (100, 5000)]
    like = write_run(records, name="like", preset="124M")
    config = like / "config.yaml"
    config.write_text(config.read_text().replace("tokens_per_step: 1024", "tokens_per_step: 524288"))
    found = rendered(like)
    reference = found.traces(0)["llm.c 124M on FineWeb"]
    assert (reference["x"], reference["y"]) == ([2000, 4000], [3.859, 3.618])
    marks = [mark["text"] for mark in found.figures["chart-3"]["layout"]["annotations"]]
    assert marks == ["OpenAI GPT-2 124M 29.45%", "llm.c 124M 29.90%"]
    other = rendered(write_run(records, name="other"))
    assert "llm.c 124M on FineWeb" not in other.traces(0)
    assert "annotations" not in other.figures["chart-3"]["layout"]


def test_time_window_draws_its_steps_only(write_run: WriteRun) -> None:
    records = [record(step, **{"samples/0": f"text {step}"}) for step in range(1, 41)]
    found = rendered(write_run(records, [start(NOW - 80, 0), start(NOW - 15, 32)]), since=19)
    assert found.traces(0)["train"]["x"] == list(range(31, 41))
    assert "text 31" in found.text
    assert "text 30" not in found.text
    assert "The last 19s" in found.text


def test_several_runs_share_the_charts(write_run: WriteRun) -> None:
    first = write_run([record(step, **{"val/loss": 3.0}) for step in range(1, 41)], name="first")
    second = write_run([record(step, **{"val/loss": 2.0}) for step in range(1, 11)], name="second")
    found = rendered(first, second)
    loss = found.traces(0)
    assert list(loss) == ["first", "first: validation", "second", "second: validation"]
    assert loss["second"]["x"] == list(range(1, 11))
    assert (loss["first: validation"]["y"][0], loss["second: validation"]["y"][0]) == (3.0, 2.0)
    assert loss["first"]["line"]["color"] == loss["first: validation"]["line"]["color"]
    assert loss["first"]["line"]["color"] != loss["second"]["line"]["color"]
    assert "firstsecond" in found.text  # header of the table
    assert "best validation loss3.0000 at step 12.0000 at step 1" in found.text
    assert "ms per step, by phase: second" in found.text
