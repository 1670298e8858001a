"""Checks of shards, windows, epochs and HellaSwag."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import changed, flip, preset

from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import EvaluationSettings, Settings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.sources import Sources
from ds_gpt2.tools.doctor import data


def test_checksums_reveal_a_flipped_bit(copied: Path) -> None:
    dataset = open_dataset(copied)
    assert data.checksums(dataset).status == "ok"
    flip(copied / dataset.shards[0].file)
    row = data.checksums(open_dataset(copied))
    assert (row.status, dataset.shards[0].file in row.found) == ("fail", True)
    (copied / "dataset.json").unlink()
    assert data.checksums(open_dataset(copied)).status == "unknown"


def test_schedule_and_windows_of_the_whole_run(dataset_dir: Path, settings: Settings) -> None:
    dataset = open_dataset(dataset_dir)
    sources = Sources((dataset,))
    steps, epochs = data.schedule(sources, settings)
    windows = sum((shard.tokens - 1) // 64 for shard in dataset.split("train"))
    assert (steps, epochs) == (12, pytest.approx(12 * 16 / windows))
    whole = changed(settings, schedule={"steps": None, "epochs": 1.5})
    per_step = plan_batch(1024, 2, 64, 2).windows_per_step
    assert data.schedule(sources, whole)[0] == math.ceil(1.5 * len(Windows(dataset, "train", 64)) / per_step)
    assert [(row.name, row.status) for row in data.windows(sources, settings)] == [
        ("validation", "ok"),
        ("epochs", "ok"),
    ]

    def status(**sections: dict[str, Any]) -> list[str]:
        return [row.status for row in data.windows(sources, changed(settings, **sections))]

    assert status(batch={"sequence_length": 1_000_000}) == ["fail", "fail"]
    assert status(schedule={"steps": 100_000}) == ["ok", "warn"]
    assert status(schedule={"steps": None, "epochs": 0.01}) == ["ok", "fail"]  # shorter than the warm-up
    assert status(batch={"tokens_per_step": 1_024_000}) == ["ok", "warn"]


def test_hellaswag(tmp_path: Path) -> None:
    chosen = preset("gpt2_124m", hellaswag__path=tmp_path / "items.jsonl").hellaswag
    assert "prepare hellaswag" in data.hellaswag(chosen).fix
    chosen.path.write_text("no item\n")
    assert (data.hellaswag(chosen).status, "not JSON" in data.hellaswag(chosen).found) == ("warn", True)
    assert data.hellaswag(preset("quickstart").hellaswag).status == "ok"


def test_items_of_an_evaluation_are_counted_or_the_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    settings = EvaluationSettings(every=5, path=path)
    missing = data.evaluation("mine", settings)
    assert missing.status == "warn" and "mine.jsonl cannot be read (No such file" in missing.found
    path.write_text('{"context": "a", "endings": ["b", "c"], "label": 0}\n{}\n')
    wrong = data.evaluation("mine", settings)
    assert wrong.status == "warn" and 'line 2: no text in "context"' in wrong.found
    path.write_text('{"context": "a", "endings": ["b", "c"], "label": 0}\n')
    good = data.evaluation("mine", settings)
    assert (good.status, good.found) == ("ok", "mine.jsonl has 1 item")
    assert list(tmp_path.iterdir()) == [path]  # nothing is written
