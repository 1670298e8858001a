"""The order of things in the loop, with parts that only take notes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gpt2.engine import Update
from ds_gpt2.loop import Course, train
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState


class Parts:
    """Every part of a training run; ``notes`` is what happened, in order."""

    def __init__(self, stop_at: int = 0, skip_at: int = 0) -> None:
        self.notes: list[str] = []
        self.records: dict[int, dict[str, Any]] = {}
        self.every, self.directory = Every(2), Path("checkpoints")
        self.plan = SimpleNamespace(tokens_per_step=100)
        self._stop_at, self._skip_at = stop_at, skip_at
        self.step, self.requested = 0, False

    def epoch(self, step: int) -> float:
        return step / 10

    def micro_batches(self, step: int) -> str:
        self.step = step
        return f"data of {step}"

    def accumulate(self, micro_batches: str) -> torch.Tensor:
        self.notes.append(f"accumulate {micro_batches}")
        self.requested = self.step == self._stop_at
        return torch.tensor(2.0)

    def apply(self, lr: float) -> Update:
        self.notes.append(f"apply {lr}")
        return Update(applied=self.step != self._skip_at, grad_norm=1.0)

    def observe(self, engine: Any, state: TrainState) -> dict[str, float]:
        self.notes.append(f"observe {state.step}")
        return {"val/loss": 3.0}

    def write(self, step: int, seen: dict[str, Any]) -> None:
        self.notes.append(f"write {step}")
        self.records[step] = seen

    def save(self, state: TrainState) -> str:
        self.notes.append(f"save {state.step}")
        return "tag"

    def flush(self) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> dict[str, float]:
        return {"perf/step_ms": 1.0}

    def eta(self, steps_left: int) -> float:
        return float(steps_left)

    def show(self, step: int, seen: dict[str, Any], eta: float) -> None: ...


def _train(parts: Parts, state: TrainState, steps: int, save: int) -> bool:
    same: Any = parts
    course = Course(steps, lambda step: step / 10, Every(save))
    return train(course, state, same, same, [same], same, same, same, same, same)


def test_a_step_is_told_in_order() -> None:
    parts = Parts()
    assert _train(parts, TrainState(), steps=3, save=3)
    assert parts.notes == [
        "accumulate data of 1", "apply 0.1", "write 1",
        "accumulate data of 2", "apply 0.2", "observe 2", "write 2",
        "accumulate data of 3", "apply 0.3", "observe 3", "write 3", "save 3",
    ]  # fmt: skip
    assert parts.records[2] == {
        "train/loss": 2.0, "train/lr": 0.2, "train/grad_norm": 1.0, "train/skipped_steps": 0, "train/tokens": 200,
        "train/epoch": 0.2, "perf/step_ms": 1.0, "val/loss": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stop_saves_the_step_just_done(stop_at: int) -> None:
    parts, state = Parts(stop_at), TrainState()
    assert not _train(parts, state, steps=100, save=50)
    assert state.step == stop_at
    assert parts.notes[-2:] == [f"write {stop_at}", f"save {stop_at}"]


def test_a_stop_in_the_last_step_is_an_end() -> None:
    assert _train(Parts(stop_at=3), TrainState(), steps=3, save=0)


def test_a_resumed_run_begins_with_the_next_step() -> None:
    parts = Parts()
    assert _train(parts, TrainState(step=5, tokens=500), steps=6, save=0)
    assert parts.notes[0] == "accumulate data of 6"
    assert parts.records[6]["train/tokens"] == 600


def test_a_finished_run_has_nothing_to_do() -> None:
    parts = Parts()
    assert _train(parts, TrainState(step=6), steps=6, save=1)
    assert parts.notes == []


def test_a_skipped_update_is_counted() -> None:
    parts, state = Parts(skip_at=2), TrainState()
    _train(parts, state, steps=3, save=0)
    assert [parts.records[step]["train/skipped_steps"] for step in (1, 2, 3)] == [0, 1, 1]
