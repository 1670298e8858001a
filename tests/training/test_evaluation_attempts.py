"""Attempts to evaluate a hook are counted over restarts; a hook that ends the process is left out."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gpt2.config.interval import Every
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.evaluation_attempts import FILE, EvaluationAttempts
from ds_gpt2.training.evaluator import Evaluator
from ds_gpt2.training.hooks import Hook, HookFailedError, Interrupted

ENGINE: Any = SimpleNamespace(device=torch.device("cpu"))


class KilledError(BaseException):
    """The process ends here."""


class OneHook(Hook):
    """Raises ``error``, or returns a metric."""

    every = Every(1)

    def __init__(self, name: str, error: BaseException | None = None) -> None:
        self.name, self.error = name, error

    def before_update(self, engine: Any) -> None:
        if self.name == "bad gradients":
            raise HookFailedError("rank 1: no memory is left")

    def observe(self, engine: Any, state: TrainState) -> StepMetrics:
        if self.error is not None:
            raise self.error
        return {f"eval/{self.name}/acc": 0.5}


def _evaluate(run_dir: Path, step: int, *hooks: Hook) -> tuple[StepMetrics, list[str]]:
    """Evaluate as a new process; return the metrics and the reports. If a hook ends the process, it only begins."""
    metrics: StepMetrics = {}
    reports: list[str] = []
    state = TrainState(step=step, unevaluated={})
    evaluator = Evaluator(hooks, EvaluationAttempts(run_dir), lambda at, text: reports.append(f"{at}: {text}"))
    try:
        evaluator.evaluate(hooks, ENGINE, state, metrics)
    except KilledError:
        return metrics, [*reports, "killed"]
    assert state.is_evaluated
    return metrics, reports


def test_a_hook_that_ends_the_process_twice_at_a_step_is_left_out_there(tmp_path: Path) -> None:
    hooks = OneHook("good"), OneHook("deadly", KilledError()), OneHook("last")
    for _ in range(2):
        assert _evaluate(tmp_path, 7, *hooks) == ({"eval/good/acc": 0.5}, ["killed"])
    metrics, reports = _evaluate(tmp_path, 7, *hooks)
    assert metrics == {"eval/good/acc": 0.5, "eval/last/acc": 0.5}
    assert reports == ["7: no deadly: the last attempts to measure it ended the process"]
    assert _evaluate(tmp_path, 8, *hooks)[1] == ["killed"]  # tried again at the next step


def test_two_hooks_that_end_the_process_are_both_left_out(tmp_path: Path) -> None:
    first, second = OneHook("deadly 1", KilledError()), OneHook("deadly 2", KilledError())
    ends = [_evaluate(tmp_path, 7, first, second)[1][-1] for _ in range(4)]
    assert ends == ["killed"] * 4
    reports = _evaluate(tmp_path, 7, first, second)[1]
    assert [report.split(":")[1] for report in reports] == [" no deadly 1", " no deadly 2"]


def test_a_hook_that_raises_is_reported_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hooks = OneHook("bad", HookFailedError("rank 1: no memory is left")), OneHook("good")
    for _ in range(3):
        found = _evaluate(tmp_path, 7, *hooks)
        assert found == ({"eval/good/acc": 0.5}, ["7: no bad: rank 1: no memory is left"])
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_cannot_read_the_gradients_is_reported_and_not_run() -> None:
    reports: list[str] = []
    evaluator = Evaluator((), EvaluationAttempts(Path("none")), lambda at, text: reports.append(f"{at}: {text}"))
    good, bad = OneHook("good"), OneHook("bad gradients")
    assert evaluator.before_update([bad, good], ENGINE, 7) == [good]
    assert reports == ["7: no bad gradients: rank 1: no memory is left"]


def test_an_interrupted_hook_is_not_counted(tmp_path: Path) -> None:
    state = TrainState(step=7, unevaluated={"train/loss": 2.0})
    hook = OneHook("slow", Interrupted())
    for _ in range(3):
        Evaluator([hook], EvaluationAttempts(tmp_path), lambda at, text: pytest.fail(text)).evaluate(
            [hook], ENGINE, state, {}
        )
        assert state.unevaluated == {"train/loss": 2.0} and not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": 7, "attempts": {"deadly": "2"}}', b"\xff" * 100])
def test_a_damaged_record_is_ignored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert _evaluate(tmp_path, 7, OneHook("good")) == ({"eval/good/acc": 0.5}, [])
    assert not (tmp_path / FILE).exists()


def test_a_directory_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    assert _evaluate(tmp_path / "missing", 7, OneHook("good")) == ({"eval/good/acc": 0.5}, [])
