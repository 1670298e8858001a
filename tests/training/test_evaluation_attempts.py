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
        self.events: list[str] = []  # receives the name at each call

    def before_update(self, engine: Any) -> None:
        if self.name == "bad gradients":
            raise HookFailedError("rank 1: no memory is left")

    def observe(self, engine: Any, state: TrainState) -> StepMetrics:
        if self.error is not None:
            raise self.error
        self.events.append(self.name)
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


LEFT_OUT = "no deadly: its last attempts ended the process"


def test_a_hook_that_ends_the_process_twice_at_a_step_is_left_out_there(tmp_path: Path) -> None:
    hooks = OneHook("good"), OneHook("deadly", KilledError()), OneHook("last")
    for _ in range(2):
        assert _evaluate(tmp_path, 7, *hooks) == ({"eval/good/acc": 0.5}, ["killed"])
    metrics, reports = _evaluate(tmp_path, 7, *hooks)
    assert metrics == {"eval/good/acc": 0.5, "eval/last/acc": 0.5}
    assert reports == [f"7: {LEFT_OUT}"]
    assert _evaluate(tmp_path, 8, *hooks)[1] == ["killed"]  # tried again at the next step


def test_evaluations_between_the_resume_and_the_step_do_not_matter(tmp_path: Path) -> None:
    """The run resumes from step 1000 each time, and evaluates steps 1250 and 1500 again."""
    for _ in range(2):
        for step in (1250, 1500):
            assert _evaluate(tmp_path, step, OneHook("deadly"))[1] == []
        assert _evaluate(tmp_path, 1750, OneHook("deadly", KilledError()))[1] == ["killed"]
    assert _evaluate(tmp_path, 1500, OneHook("deadly"))[1] == []
    assert _evaluate(tmp_path, 1750, OneHook("deadly", KilledError()))[1] == [f"1750: {LEFT_OUT}"]


def test_a_hook_that_ends_the_process_at_three_steps_is_left_out_from_then_on(tmp_path: Path) -> None:
    deadly = OneHook("deadly", KilledError())
    for step in (5, 10, 15):
        ends = [_evaluate(tmp_path, step, deadly)[1] for _ in range(3)]
        assert ends == [["killed"], ["killed"], [f"{step}: {LEFT_OUT}"]]
    assert _evaluate(tmp_path, 20, deadly)[1] == [f"20: {LEFT_OUT}"]
    (tmp_path / FILE).unlink()
    assert _evaluate(tmp_path, 25, deadly)[1] == ["killed"]


def test_a_success_forgets_earlier_steps(tmp_path: Path) -> None:
    deadly = OneHook("deadly", KilledError())
    for step in (5, 10, 15, 20):
        assert [_evaluate(tmp_path, step, deadly)[1][-1] for _ in range(2)] == ["killed"] * 2
        assert _evaluate(tmp_path, step + 1, OneHook("deadly"))[1] == []


def test_two_hooks_that_end_the_process_are_both_left_out(tmp_path: Path) -> None:
    first, second = OneHook("deadly 1", KilledError()), OneHook("deadly 2", KilledError())
    ends = [_evaluate(tmp_path, 7, first, second)[1][-1] for _ in range(4)]
    assert ends == ["killed"] * 4
    reports = _evaluate(tmp_path, 7, first, second)[1]
    assert [report.split(":")[1] for report in reports] == [" no deadly 1", " no deadly 2"]


@pytest.mark.parametrize(
    ("attempts", "waits"), [(0, ["awaited", "unbounded"]), (1, ["awaited", "awaited", "unbounded"])]
)
def test_the_save_is_awaited_before_what_may_end_the_process(tmp_path: Path, attempts: int, waits: list[str]) -> None:
    """A hook that needs no more memory than a step runs while the save is written, unless it was tried before."""
    for _ in range(attempts):
        EvaluationAttempts(tmp_path).begin(7, "validation loss")
    events: list[str] = []
    bounded, unbounded = OneHook("validation loss"), OneHook("unbounded")
    bounded.is_bounded = True
    unbounded.events = events
    evaluator = Evaluator([bounded, unbounded], EvaluationAttempts(tmp_path), lambda at, text: pytest.fail(text))
    state = TrainState(step=7, unevaluated={})
    evaluator.evaluate([bounded, unbounded], ENGINE, state, {}, lambda: events.append("awaited"))
    assert events == waits


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


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"attempts": {"good": {"7": "2"}}}', b'{"attempts": {"good": {"x": 2}}}', b"\xff" * 100]
)
def test_a_damaged_record_is_ignored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert _evaluate(tmp_path, 7, OneHook("good")) == ({"eval/good/acc": 0.5}, [])
    assert not (tmp_path / FILE).exists()


def test_a_directory_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    assert _evaluate(tmp_path / "missing", 7, OneHook("good")) == ({"eval/good/acc": 0.5}, [])
