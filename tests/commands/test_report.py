"""``report``: output files, JSON and errors."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import write_checkpoint
from launched import PROJECT

from ds_gpt2 import cli
from ds_gpt2.commands import report
from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import Heartbeat

CONFIG = """
run: {name: NAME, dir: RUNS}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 100, warmup_steps: 1}
checkpoint: {dir: CHECKPOINTS}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs of forty steps; the newest step ends now."""
    for name in ("one", "two"):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        config = CONFIG.replace("RUNS", str(tmp_path / "runs")).replace("CHECKPOINTS", str(tmp_path / "checkpoints"))
        (directory / "config.yaml").write_text(config.replace("NAME", name))
        now = time.time()
        records = [{"step": step, "time": now - 60 * (40 - step), "train/loss": 3.0} for step in range(1, 41)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Heartbeat(directory, 0).begin_step(41, 41)
    return tmp_path


def run(folder: Path, *words: str, runs: tuple[str, ...] = ("one",)) -> int:
    """Run the command with parsed arguments."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([*(str(folder / "runs" / name) for name in runs), *words]))


def figures(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, **more: Any) -> list[dict[str, Any]]:
    assert run(folder, "--json", *words, **more) == exit_codes.DONE
    return json.loads(capsys.readouterr().out)


def test_report_is_written_to_the_run_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "runs" / "one" / "report.html"
    for _ in range(2):  # the second one replaces the first
        assert run(folder) == exit_codes.DONE
        size = f"{file.stat().st_size / 1e6:.1f} MB"
        assert capsys.readouterr().out == f"{file}: {size}, opens in any browser without a network\n"
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in file.parent.iterdir() if "report" in path.name] == ["report.html"]


def test_several_runs_share_one_file(folder: Path) -> None:
    assert run(folder, "--out", str(folder / "both.html"), runs=("one", "two", "one")) == exit_codes.DONE
    page = (folder / "both.html").read_text()
    assert "<h1>Runs one, two</h1>" in page
    assert not (folder / "runs" / "one" / "report.html").exists()


def test_json_is_printed_instead_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = figures(folder, capsys, "--since", "10.5m", "--price-per-hour", "6", runs=("one", "two"))
    assert (one["run"], two["run"]) == ("one", "two")
    assert (one["state"], one["step"], one["loss"], one["since"]["steps"]) == ("running", 40, 3.0, 11)
    assert one["seconds_left"]["mean"] == pytest.approx(3600)
    assert one["cost"]["hours_money"]["mean"] == pytest.approx(6)
    assert not list(folder.rglob("report.html"))


def test_parse_span_returns_seconds() -> None:
    assert [report.parse_span(text) for text in ("90m", "24h", "7d", "1.5h")] == [5400, 86_400, 604_800, 5400]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--since", "24"], "--since 24: must be minutes, hours or days"),
        (["--since", "0h"], "such as 90m, 24h or 7d"),
        (["--watts", "-1"], "--watts -1: must be a number above 0"),
        (["--price-per-hour", "nan"], "--price-per-hour nan: must be"),
        (["--price-per-kwh", "0.3"], "run one has no recorded power; set --watts as well"),
        (["--out", "FOLDER/gone/report.html"], "cannot write .*: No such file or directory; set another --out"),
        (["--out", "FOLDER/runs"], "cannot write .*: Is a directory"),
        (["--out", "FOLDER/runs/one/metrics.jsonl"], "metrics.jsonl exists and is not a report: set another --out"),
    ],
)
def test_wrong_option_is_an_error(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, *(word.replace("FOLDER", str(folder)) for word in words))
    assert not list(folder.rglob("*.tmp"))


def test_unknown_run_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no run .*three"):
        run(folder, runs=("three",))


def test_unreadable_file_is_an_error(folder: Path) -> None:
    (folder / "runs" / "one" / "metrics.jsonl").unlink()
    (folder / "runs" / "one" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: Is a directory; move it away, or restore"):
        run(folder)


@pytest.mark.parametrize("content", [None, b"", b"\0\xff" * 100])
def test_missing_metrics_of_a_saved_run_are_reported_with_the_step_of_its_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    shutil.rmtree(folder / "runs" / "one" / "heartbeat")
    write_checkpoint(folder / "checkpoints" / "one", "rolling_step_000035", 35)
    file = folder / "runs" / "one" / "metrics.jsonl"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    what = "is missing" if content is None else "has no readable record"
    warning = f"warning: {file} {what}: the losses up to step 35 are unknown; restore it from a copy of the run\n"
    run_dirs = [str(folder / "runs" / name) for name in ("one", "two")]
    assert cli.main(["report", run_dirs[0], "--json"]) == exit_codes.DONE
    out, err = capsys.readouterr()
    assert (json.loads(out)[0]["step"], err) == (35, warning)
    assert cli.main(["report", run_dirs[0]]) == exit_codes.DONE
    assert "record: step 35 is known from a checkpoint." in (folder / "runs" / "one" / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["status", run_dirs[0], "--json"]) == exit_codes.CRASHED
    assert json.loads(capsys.readouterr().out)["progress"]["step"] == 35
    assert cli.main(["diff", *run_dirs, "--json"]) == exit_codes.DONE
    out, err = capsys.readouterr()
    assert (json.loads(out)["final_metrics"]["steps"], err) == ({"a": 35, "b": 40}, warning)


def test_counts_are_integers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 41, "time": time.time(), "train/tokens": 286720.0, "train/skipped_steps": 2.0}
    with (folder / "runs" / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    (one,) = figures(folder, capsys)
    assert [json.dumps(one[name]) for name in ("step", "tokens", "skipped_steps")] == ["41", "286720", "2"]


def test_report_of_a_run_with_settings_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "one" / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "runs" / "one" / "heartbeat")
    assert figures(folder, capsys, "--since", "1h")[0]["state"] == "dead"
    assert run(folder) == exit_codes.DONE
    assert "No data yet: nothing is recorded." in (folder / "runs" / "one" / "report.html").read_text()


def test_report_does_not_import_torch() -> None:
    code = "import sys, ds_gpt2.commands.report; print({'torch', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
