"""The validation loss of the averaged weights: apart from that of the weights, on the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ds_gpt2.config.settings import ValidationSettings
from ds_gpt2.data.sources import HeldOut
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
from ds_gpt2.training.evaluator import Evaluator
from ds_gpt2.training.hooks import AveragedValidation, Interrupted, Validation


class Windows:
    """Ten windows of zeros; counts those that were read."""

    sequence_length = 8
    reads = 0

    def __len__(self) -> int:
        return 10

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self.reads += len(indices)
        return np.zeros((len(indices), 9), dtype=np.int64)


class Model(torch.nn.Module):
    """A model whose loss is its weight; above 3 it raises ``error``."""

    error: Exception | None = None
    weight = 3.0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        if self.weight > 3.0 and self.error is not None:
            raise self.error
        return self.weight


class FakeEngine:
    """The attributes of an engine that the hooks use; the average of the weight is 4."""

    def __init__(self) -> None:
        self.model, self.device = Model(), torch.device("cpu")

    def use_averaged_weights(self) -> None:
        self.model.weight = 4.0

    def use_trained_weights(self) -> None:
        self.model.weight = 3.0


def evaluated(engine: Any, folder: Path, state: TrainState) -> tuple[StepMetrics, list[str]]:
    """Return the metrics of both hooks at a step, and what was reported."""
    windows: Any = Windows()
    validation = Validation(ValidationSettings(every=5, tokens=80), [HeldOut(windows)], group=2)
    hooks = [validation, AveragedValidation(validation)]
    reports: list[str] = []
    metrics: StepMetrics = {}
    evaluator = Evaluator(hooks, EvaluationAttempts(folder), lambda step, text: reports.append(text))
    assert evaluator.due(5, 100) == hooks and evaluator.due(6, 100) == []
    evaluator.evaluate(hooks, engine, state, metrics)
    return metrics, reports


def test_both_losses_are_measured_and_logged(tmp_path: Path, log_messages: list[str]) -> None:
    engine = FakeEngine()
    metrics, reports = evaluated(engine, tmp_path, TrainState(step=5))
    assert (metrics["val/loss"], metrics["val/loss_ema"], reports) == (3.0, 4.0, [])
    assert engine.model.weight == 3.0
    assert log_messages == [
        "step 5: validation loss 3.0000  (best so far)",
        "step 5: validation loss of the averaged weights 4.0000",
    ]


def test_a_failure_with_the_averaged_weights_does_not_cost_the_loss_of_the_weights(tmp_path: Path) -> None:
    engine, state = FakeEngine(), TrainState(step=5)
    engine.model.error = RuntimeError("out of memory")
    metrics, (report,) = evaluated(engine, tmp_path, state)
    assert metrics["val/loss"] == 3.0 and "val/loss_ema" not in metrics and "marks/best" in metrics
    assert (state.val_loss, state.best_step, engine.model.weight) == (3.0, 5, 3.0)
    assert report.startswith("no validation loss of the averaged weights: rank 0: ") and "out of memory" in report


def test_a_stop_with_the_averaged_weights_leaves_the_step_unevaluated(tmp_path: Path) -> None:
    engine, state = FakeEngine(), TrainState(step=5, unevaluated={})
    engine.model.error = Interrupted()
    evaluated(engine, tmp_path, state)
    assert not state.is_evaluated and state.best_step is None and engine.model.weight == 3.0


@pytest.mark.parametrize("first", ["averaged", "weights"])
def test_sources_without_a_share_are_evaluated_only_for_the_loss_of_the_weights(first: str) -> None:
    """If the averaged weights are evaluated first, the bytes of all sources are still counted."""
    parts: list[Any] = [Windows(), Windows()]
    held_out = [HeldOut(parts[0], "main", 1.0), HeldOut(parts[1], "old", 0.0)]
    validation = Validation(ValidationSettings(every=5, tokens=80), held_out, group=2)
    averaged, state = AveragedValidation(validation), TrainState(step=5)
    engine: Any = FakeEngine()
    hooks = [averaged, validation] if first == "averaged" else [validation, averaged]
    found: StepMetrics = {}
    for hook in hooks:
        found |= hook.observe(engine, state)
    assert found["val/loss_ema"] == 4.0 and found["val/main/loss"] == found["val/old/loss"] == 3.0
    assert parts[0].reads == 2 * parts[1].reads > 0
    assert found["val/bits_per_byte"] == pytest.approx(3.0 / np.log(2))  # token 0 is one byte
