"""Run the programs in benchmarks/ that no other test runs, with tiny models. Their results are not meaningful."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, launch, run
from small_run import hellaswag_item

from benchmarks.host_pair import problem
from benchmarks.run import Goal

pytestmark = pytest.mark.ranks


def start(program: str, *words: object) -> str:
    done = run([sys.executable, str(PROJECT / "benchmarks" / program), *map(str, words)], timeout=1200)
    assert done.code == 0, done.output
    assert done.left_over == []
    return done.output


@pytest.mark.extended
def test_the_gpu_suite_runs_on_any_machine_and_shows_no_figures_of_tiny_models(
    tmp_path: Path, dataset_dir: Path
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(hellaswag_item(number)) + "\n" for number in range(12)), encoding="utf-8")
    words = ("--suite", "gpu", "--toy", "--data", dataset_dir, "--hellaswag", items, "--out", tmp_path / "out")
    table = start("run.py", *words).splitlines()
    rows = json.loads((tmp_path / "out" / "goals_gpu.json").read_text())["goals"]
    assert {row["goal"] for row in rows} == {"S1", "S2", "S4", "S5", "S6", "S8", "S9"}
    assert {row["measured"] for row in rows} == {"not measured"} and {row["ratio"] for row in rows} == {None}
    assert sum("not measured" in line for line in table) == len(rows)
    found: dict[str, Any] = json.loads((tmp_path / "out" / "throughput_gpu_gpu.json").read_text())
    for name, curve in found["curves"].items():
        assert curve == pytest.approx(found["curves"]["plain"], abs=0.02), name


def test_the_gpu_suite_measures_nothing_without_a_gpu(tmp_path: Path, dataset_dir: Path) -> None:
    words = ("--suite", "gpu", "--data", dataset_dir, "--hellaswag", tmp_path / "none", "--out", tmp_path)
    assert "S1" in start("run.py", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["goals_gpu.json"]


def test_a_goal_is_reached_at_ratio_one() -> None:
    speed = Goal("S1", "speed", 100, "tokens/s", lambda it: it["rate"])
    time = Goal("S4", "time", 5, "ms", lambda it: it["ms"], at_most=True)
    assert (speed.ratio(100), speed.ratio(50), time.ratio(5), time.ratio(10)) == (1, 0.5, 1, 0.5)


@pytest.mark.extended
def test_tokenizing_loading_and_exporting_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["The statement of a program is read, and it runs."] * 2000), encoding="utf-8")
    out = tmp_path / "out.json"
    small = ("--scratch", tmp_path, "--out", out)
    start("tokenizing.py", "--text", text, "--megabytes", 3, "--rounds", 1, "--shard_tokens", 200_000, *small)
    assert json.loads(out.read_text())["speed"]["megabytes"] > 0
    shards = ("--shards", 3, "--shard_tokens", 700_000, "--tokens_per_s", 20_000_000)
    start("loader.py", "--steps", 3, *shards, "--played", 1, *small)
    start("export.py", "--preset", "7M", "--ranks", 2, *small)


@pytest.mark.extended
def test_the_memory_and_traffic_of_zero_match_the_documentation(tmp_path: Path, dataset_dir: Path) -> None:
    out = tmp_path / "scaling.json"
    done = launch(2, "--data", str(dataset_dir), "--out", str(out), script=PROJECT / "benchmarks" / "scaling.py")
    assert done.code == 0, done.output
    found = json.loads(out.read_text())
    assert abs(found["off"]) < 1e-4
    documented = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for preset, sizes in found["memory_gb"].items():
        assert f"| {preset} | " + " | ".join(f"{sizes[ranks]['ZeRO-1, 2']:.2f}" for ranks in sizes) + " |" in documented


@pytest.mark.extended
def test_two_hosts_send_as_many_bytes_as_the_documentation_says(tmp_path: Path, dataset_dir: Path) -> None:
    if (reason := problem()) is not None:
        pytest.skip(reason)  # as in two_hosts.py
    out = tmp_path / "two_hosts.json"
    start("two_hosts.py", "--data", dataset_dir, "--out", out, "--rounds", 1, "--steps", 1)
    for name, found in json.loads(out.read_text())["runs"].items():
        assert found["sent_bytes"] == pytest.approx(found["predicted_bytes"], rel=0.02), name


@pytest.mark.extended
def test_the_costs_of_the_moving_average_are_measured_in_pairs(tmp_path: Path, dataset_dir: Path) -> None:
    out = tmp_path / "ema.json"
    small = ("--preset", "toy", "--rounds", "3", "--steps", "2", "--tokens", "1280")
    words = ("--data", str(dataset_dir), "--out", str(out), *small)
    done = launch(2, *words, script=PROJECT / "benchmarks" / "ema.py")
    assert done.code == 0 and done.left_over == [], done.output
    found = json.loads(out.read_text())
    for name in ("step_ms", "validation_ms"):
        assert found[name]["without"]["values"] == found[name]["with"]["values"] == found[name]["added"]["values"] == 3
    assert found["save"]["bytes_per_parameter"] == pytest.approx({"without": 14, "with": 18}, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["ema.json"]
