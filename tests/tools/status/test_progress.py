"""Progress, speed and losses of ``status``."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest
from run_files import CONFIG, NOW, RunFiles

from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.tools.status.screen import screen


def test_time_left_follows_from_the_pace(healthy_run: RunFiles) -> None:
    status = healthy_run.status()
    assert (status.progress.steps, status.progress.done_share) == (2000, 0.5)
    assert status.progress.left_seconds == pytest.approx(10_000)
    assert status.finish_time == pytest.approx(NOW + 10_000)
    text = screen(status)
    assert "step        1,000 of 2,000, 50.0%" in text
    assert "left        2h 46m" in text


def test_planned_steps_of_the_start_override_epochs(files: RunFiles) -> None:
    """Skipped batches advance the epoch without a step."""
    files.configure(CONFIG.replace("steps: 2000", "epochs: 3"))
    files.train(50, **{"train/epoch": 0.26})
    (files.run_dir / "starts.jsonl").write_text('{"from_step": 0, "steps": 600}\n')
    assert files.status().progress.steps == 600


def test_settings_edited_after_the_last_start_do_not_apply(files: RunFiles) -> None:
    files.train(500)
    (files.run_dir / "starts.jsonl").write_text('{"from_step": 0, "steps": 500}\n')
    assert "step        500 of 500, 100.0%" in screen(files.status())


def test_heartbeat_may_be_ahead_of_the_records(healthy_run: RunFiles) -> None:
    """Records are missing if the disk is full."""
    healthy_run.beat(step=1101)
    assert healthy_run.status().progress.step == 1100


def test_training_loss_is_the_median_of_the_last_50_records(files: RunFiles) -> None:
    files.train(20_000)
    records = list(read_metrics(files.run_dir / "metrics.jsonl"))
    losses = [record["train/loss"] for record in records]
    status = files.status()
    assert status.loss.train == statistics.median(losses[-50:])
    assert status.loss.train_day_before == statistics.median(losses[-8640 - 1 - 50 : -8640 - 1])
    assert (status.loss.val, status.loss.val_step, status.loss.reference) == (None, None, None)
    assert "loss        10.1234 (median of last 50 steps)" in screen(
        replace(status, loss=replace(status.loss, train=10.1234))
    )
    files.save(19_000)
    assert (files.status().loss.val, files.status().loss.val_step) == (5.5, 18_999)  # from the state in the checkpoint


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_validation_loss_that_is_not_finite_is_skipped(files: RunFiles, bad: float) -> None:
    """A checkpoint of an earlier version may hold it as the best loss."""
    files.train(20)
    state = {"val_loss": bad, "val_step": 949, "best_val_loss": bad, "best_step": 949}
    files.save(950, state=state)
    assert files.status().loss.val is files.status().loss.best_val is None
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        for step, value in ((951, 3.5), (952, 4.0), (953, None)):
            records.write(json.dumps({"step": step, "time": NOW, "val/loss": value}) + "\n")
    loss = files.status().loss
    assert (loss.val, loss.val_step, loss.best_val, loss.best_val_step) == (4.0, 952, 3.5, 951)
    text = screen(files.status())
    assert "validation  not finite at step 953\n  finite    4.0000 at step 952\n  best      3.5000 at step 951" in text
