"""The recipe for fine-tuning, with a small model of random weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from launched import PROJECT, launch

from ds_gpt2.config.settings import load_settings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.evaluation.loss import window_losses
from ds_gpt2.model.shape import VOCABULARY
from ds_gpt2.pretrained import load
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

RECIPE = PROJECT / "ds_configs" / "finetune_gpt2.yaml"


def test_the_recipe_starts_from_gpt2_with_a_low_linear_rate() -> None:
    settings = load_settings(RECIPE)
    assert settings.model.init_from == "gpt2" and settings.model.preset == "124M"
    assert settings.schedule.shape == "linear" and settings.schedule.max_lr == 3e-5 and settings.schedule.min_lr == 0


@pytest.mark.ranks
def test_fine_tuning_starts_from_the_weights_of_a_directory_and_improves_on_them(
    tmp_path: Path, dataset_dir: Path
) -> None:
    from pretrained_helpers import make  # imported late: it skips the calling test without transformers

    model = make(tmp_path / "model")
    shape = ["model.preset=null", "model.layers=2", "model.heads=4", "model.width=32", f"model.init_from={model}"]
    small = ["batch.sequence_length=32", "batch.micro_batch=4", "batch.tokens_per_step=1024", "validation.tokens=4096"]
    short = ["schedule.steps=40", "schedule.warmup_steps=4"]
    rare = ["validation.every=10", "samples.every=0"]
    own = [f"run.dir={tmp_path}/runs", f"checkpoint.dir={tmp_path}/checkpoints", f"data.dir={dataset_dir}"]
    found = load.read(model)
    windows = Windows(open_dataset(dataset_dir), "val", 32)
    given = float(window_losses(load.as_model(found.shape, found.weights), windows, 4096 // 32).mean())
    assert given > math.log(VOCABULARY) + 1, "far from that of new weights"
    done = launch(2, "--config", str(RECIPE), *shape, *small, *short, *rare, *own, "run.name=mine")
    assert done.code == 0, done.output
    assert f"initial weights from {model}" in done.output
    records = {record["step"]: record for record in read_metrics(tmp_path / "runs" / "mine" / METRICS)}
    assert records[1]["train/loss"] == pytest.approx(given, abs=0.4)
    assert records[40]["val/loss"] < given - 0.05, "more than bf16 rounds"
    assert records[5]["train/lr"] == 3e-5 and records[40]["train/lr"] == pytest.approx(3e-5 / 36)
    assert (tmp_path / "checkpoints" / "mine" / "best_model").is_dir()
