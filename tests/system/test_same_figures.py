"""Each figure has the same value in ``status``, ``report``, ``diff``, ``list`` and the records."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import Run

from ds_gpt2.cli import main
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.run_dir.starts import TIME

NOW = time.time()
STEPS = 5200


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command with ``--json`` and returns its output."""

    def run(*words: object) -> Any:
        code = main([*map(str, words), "--json"])
        assert code in (exit_codes.DONE, exit_codes.CRASHED)  # status: not healthy
        return json.loads(capsys.readouterr().out)

    return run


def figures_of_records(run_dir: Path) -> dict[str, Any]:
    """Compute the figures from the records of a run of 12 steps that was started once."""
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    last = records[-1]

    def median(tag: str) -> float:
        return statistics.median(record[tag] for record in records[-50:])

    best_step, best = min(validations_of(run_dir).items(), key=lambda validation: validation[1])
    return {
        "step": 12,
        "steps": 12,
        "tokens": last["train/tokens"],
        "epochs": last["train/epoch"],
        "loss": median("train/loss"),
        "tokens_per_s": median("perf/tokens_per_s"),
        "step_seconds": median("perf/step_ms") / 1000,
        "val_loss": validations_of(run_dir)[12],
        "best": (best, best_step),
        "goodput": last["perf/goodput"],
        "starts": (0, 0, 0.0, 1.0),
    }


def validations_of(run_dir: Path) -> dict[int, float]:
    """Return the recorded validation losses by step."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return {record["step"]: record["val/loss"] for record in records if "val/loss" in record}


def figures_of_status(status: dict[str, Any]) -> dict[str, Any]:
    progress, loss, history = status["progress"], status["loss"], status["history"]
    return {
        "step": progress["step"],
        "steps": progress["steps"],
        "tokens": progress["tokens"],
        "epochs": progress["epochs"],
        "loss": loss["train"],
        "tokens_per_s": progress["tokens_per_second"],
        "step_seconds": progress["step_seconds"],
        "val_loss": loss["val"],
        "best": (loss["best_val"], loss["best_val_step"]),
        "goodput": history["goodput"],
        "starts": (history["restarts"], history["resumes"], history["lost_seconds"], history["kept_share"]),
    }


def figures_of_report(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": report["step"],
        "steps": report["steps"],
        "tokens": report["tokens"],
        "epochs": report["epoch"],
        "loss": report["loss"],
        "tokens_per_s": report["tokens_per_s"],
        "step_seconds": report["step_seconds"],
        "val_loss": report["val_loss"],
        "best": (report["best_val_loss"], report["best_val_step"]),
        "goodput": report["goodput"],
        "starts": (report["restarts"], report["resumes"], report["lost_seconds"], report["kept_share"]),
    }


def test_status_and_report_agree_on_a_real_run(four_ranks: Run, json_of: Callable[..., Any]) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    status, (report,) = json_of("status", run_dir), json_of("report", run_dir)
    expected = figures_of_records(run_dir)
    assert figures_of_status(status) == expected
    assert figures_of_report(report) == expected
    assert status["progress"]["seconds_per_step"] == pytest.approx(report["seconds_per_step"]["mean"])


def test_diff_agrees_on_a_real_run(four_ranks: Run, json_of: Callable[..., Any]) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    diff, (report,) = json_of("diff", run_dir, run_dir), json_of("report", run_dir)
    final = {name: pair["a"] for name, pair in diff["final_metrics"].items()}
    by_diff = {
        "step": final["steps"],
        "tokens": final["tokens"],
        "loss": final["train/loss"],
        "tokens_per_s": final["perf/tokens_per_s"],
        "val_loss": final["val/loss"],
    }
    expected = figures_of_records(run_dir)
    assert by_diff == {name: expected[name] for name in by_diff}
    assert final["val/loss, lowest"] == expected["best"][0]
    *_, last = read_metrics(run_dir / "metrics.jsonl")
    assert report["hellaswag_acc_norm"] == final["hellaswag/acc_norm"] == last["hellaswag/acc_norm"]
    measured = {step * 1024: loss for step, loss in validations_of(run_dir).items()}
    assert {each["tokens"]: each["validation"]["a"] for each in diff["losses"]} == measured


def test_list_agrees_on_a_real_run(four_ranks: Run, json_of: Callable[..., Any]) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    status, rows = json_of("status", run_dir), json_of("list", four_ranks[1] / "checkpoints" / "test")
    best = next(row for row in rows if row["tag"] == "best_model")
    assert (best["val_loss"], best["step"]) == figures_of_records(run_dir)["best"]
    assert status["checkpoint"]["tag"] == next(row["tag"] for row in rows if "latest" in row["pointers"])


def test_text_output_shows_the_same_figures(
    four_ranks: Run, json_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure is named: a median or the newest value."""
    run_dir = four_ranks[1] / "runs" / "test"
    loss = f"{json_of('status', run_dir)['loss']['train']:.4f}"
    main(["status", str(run_dir)])
    main(["diff", str(run_dir), str(run_dir)])
    text = " ".join(capsys.readouterr().out.split())
    main(["report", str(run_dir), "--out", str(run_dir.parent / "page.html")])
    page = (run_dir.parent / "page.html").read_text()
    assert f"loss {loss} (median of last 50 steps)" in text
    assert f"train/loss, median of last 50 steps {loss} {loss} +0.0000" in text
    assert f"Loss {loss} (median of last 50 steps), validation" in page
    assert f"<th>loss (median of last 50 steps)</th><td>{loss}</td>" in page


CONFIG = """
run: {name: test, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: FOLDER/data}
batch: {tokens_per_step: 1024, micro_batch: 1}
schedule: {epochs: 4, warmup_steps: 1}
checkpoint: {dir: FOLDER/checkpoints, every: 2600}
validation: {every: 100}
hellaswag: {every: 2600}
samples: {every: 0}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A run with steps of 2 s, one restart and one resume; HellaSwag and a save precede the newest 2,000 steps."""
    run_dir = tmp_path / "runs" / "test"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    events, starts, now = [], [], NOW - 3 * STEPS
    records: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        before = step - 1
        if before in (0, 3000, 4000):
            kinds = {0: ["launch"], 3000: ["crash", "restart", "launch"], 4000: ["stop", "launch"]}[before]
            now += 600 if before else 0
            events += [{"time": now - 5, "kind": kind, "step": before, "text": kind} for kind in kinds]
            events += [{"time": now, "kind": "start", "step": before, "text": "start"}]
            at = time.strftime(TIME, time.localtime(now))
            starts.append({"time": at, "from_step": before, "world_size": 2, "steps": 8000})
            extra = {}
        else:
            extra = {"perf/eval_ms": 90_000.0 if before % 2600 == 0 else 5000.0} if before % 100 == 0 else {}
            extra |= {"perf/save_ms": 4000.0} if before % 2600 == 0 else {}
        now += 2 + sum(extra.values()) / 1000
        numbers = {"train/loss": 9.0 - step / STEPS, "train/epoch": step / 2000.5, "train/tokens": 1024 * step}
        validation: dict[str, float | None] = {}
        if step % 100 == 0:
            validation["val/loss"] = None if step == STEPS else 9.0 - step / STEPS
        speed = {"perf/step_ms": 2000.0, "perf/tokens_per_s": 512.0, "perf/goodput": 0.75}
        records.append({"step": step, "time": now, **numbers, **validation, **speed, **extra})
        if step in (3000, 4000):
            events.append({"time": now, "kind": "save", "step": step, "text": "saved", "facts": {"taken": now}})
    for name, lines in (("journal", events), ("starts", starts), ("metrics", records)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_status_and_report_agree_on_a_long_run(written: Path, json_of: Callable[..., Any]) -> None:
    """``status`` reads the ends of the files, ``report`` reads all of them."""
    status, (report,) = json_of("status", written), json_of("report", written)
    progress, history = status["progress"], status["history"]
    # Steps 5201 to 8000; 26 validations alone; HellaSwag and a save as well after 7800 and at the end.
    left = 2800 * 2 + 26 * 5 + 90 + 90 + 2 * 4
    assert progress["left_seconds"] == pytest.approx(left) and report["seconds_left"]["mean"] == pytest.approx(left)
    assert progress["left_seconds_low"] == pytest.approx(report["seconds_left"]["low"])
    assert progress["steps"] == report["steps"] == 8000
    assert progress["seconds_per_step"] == pytest.approx(report["seconds_per_step"]["mean"])
    figures = ("restarts", "resumes", "goodput", "lost_seconds")
    assert [history[name] for name in figures[:3]] == [report[name] for name in figures[:3]] == [1, 1, 0.75]
    assert history["lost_seconds"] == pytest.approx(
        report["lost_seconds"], abs=60
    )  # the commands run one after the other
    assert report["lost_seconds"] >= 600
    loss = status["loss"]
    assert (loss["val"], loss["val_step"]) == (report["val_loss"], STEPS - 100)  # the newest loss is NaN
    assert (loss["best_val"], loss["best_val_step"]) == (report["best_val_loss"], report["best_val_step"])
