"""Training on a mixture of sources with real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import launch

from ds_gpt2.checkpoint.catalog import newest_step, scan
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

pytestmark = pytest.mark.ranks

SEQUENCE = 64
STEPS, WINDOWS_PER_STEP = 12, 16
LATER = {"from_step": 7, "mixture": [{"dir": "b", "weight": 1}, {"dir": "c", "weight": 1}]}

Metrics = dict[int, dict[str, Any]]


@pytest.fixture
def configure(sources: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    def write(folder: Path = tmp_path, steps: int = STEPS, **data: object) -> Path:
        mixture = [{"dir": "a", "weight": 0.75}, {"dir": "b", "weight": 0.25}]
        content = json.dumps({"mixture": mixture, "stages": [LATER], **data})
        for name in "abc":
            content = content.replace(f'"dir": "{name}"', f'"dir": "{sources / name}"')
        return write_config(
            folder,
            data=yaml.safe_load(content),
            model={"layers": 2, "heads": 2, "width": 32, "dropout": 0.1},
            schedule={"steps": steps, "warmup_steps": 3, "shape": "constant"},
            samples={"every": 0},
        )

    return write


def metrics_of(folder: Path) -> Metrics:
    return {record["step"]: record for record in read_metrics(folder / "runs" / "test" / METRICS)}


def ledger(folder: Path) -> str:
    newest = scan(folder / "checkpoints" / "test")[0].manifest
    assert newest is not None
    return str(newest.state["ledger"])


def test_a_mixture_is_trained_in_its_shares_and_resumed_on_another_number_of_ranks(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch(2, "--config", str(configure(whole)))
    assert done.code == 0, done.output
    for ranks, steps in ((2, 4), (1, 8), (4, STEPS)):  # the second part crosses the stage
        resume = ("--resume", "auto") if steps > 4 else ()
        done = launch(ranks, "--config", str(configure(parts, steps)), *resume)
        assert done.code == 0, done.output
    assert ledger(parts) == ledger(whole)

    found = metrics_of(whole)
    windows = {name: [found[step][f"data/{name}/tokens"] / SEQUENCE for step in (6, STEPS)] for name in "abc"}
    first, rest = 6 * WINDOWS_PER_STEP, (STEPS - 6) * WINDOWS_PER_STEP
    assert windows["a"] == [0.75 * first, 0.75 * first]
    assert windows["b"] == [0.25 * first, 0.25 * first + rest / 2]
    assert windows["c"] == [0, rest / 2]
    assert 0 < found[STEPS]["data/c/epoch"] < found[STEPS]["data/b/epoch"]
    resumed = metrics_of(parts)
    for step in range(1, 5):
        assert resumed[step]["train/loss"] == found[step]["train/loss"]
    for step in range(5, STEPS + 1):
        assert resumed[step]["train/loss"] == pytest.approx(found[step]["train/loss"], rel=1e-2)
        assert {name: resumed[step][name] for name in resumed[step] if name.startswith("data/")} == {
            name: found[step][name] for name in found[step] if name.startswith("data/")
        }
    validated = found[STEPS]
    shares = 0.75 * validated["val/a/loss"] + 0.25 * validated["val/b/loss"]
    assert validated["val/loss"] == pytest.approx(shares, rel=1e-12) and "val/c/loss" in validated


def test_a_stage_that_has_begun_cannot_be_changed_and_a_later_one_can(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    done = launch(1, "--config", str(configure(steps=8)))
    assert done.code == 0, done.output
    checkpoints = tmp_path / "checkpoints" / "test"

    def resumed(**data: object) -> tuple[int, str]:
        again = launch(1, "--config", str(configure(**data)), "--resume", "auto")
        return again.code, again.output

    changes: list[dict[str, object]] = [
        {"mixture": [{"dir": "a", "weight": 0.5}, {"dir": "b", "weight": 0.5}]},
        {"mixture": [{"dir": "c", "weight": 0.75}, {"dir": "b", "weight": 0.25}]},
        {"stages": []},
        {"stages": [{**LATER, "from_step": 8}]},
    ]
    for changed in changes:
        code, output = resumed(**changed)
        assert code == 2, output
        assert "another data.mixture or data.stages until step 8 (a new stage begins at step 9" in output, output
    code, output = resumed(mixture=[], stages=[], dir="a")
    assert code == 2 and "was made with data a mixture (this run has " in output, output
    assert newest_step(checkpoints) == 8
    code, output = resumed(stages=[LATER, {"from_step": 10, "mixture": [{"dir": "a", "weight": 1}]}])
    assert code == 0, output
    assert metrics_of(tmp_path)[STEPS]["data/a/tokens"] > metrics_of(tmp_path)[9]["data/a/tokens"]


def test_a_source_that_is_needed_more_often_than_allowed_is_refused(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    mixture = [{"dir": "a", "weight": 0.75}, {"dir": "b", "weight": 0.25, "epochs": 1.5}]
    refused = launch(1, "--config", str(configure(steps=2000, mixture=mixture)))
    assert refused.code == 2, refused.output
    error = next(line for line in refused.output.splitlines() if line.startswith("error: "))
    assert "data.mixture: 2,000 steps make " in error and " passes over b, more than its epochs 1.5: lower its" in error
    assert not (tmp_path / "runs").exists()
