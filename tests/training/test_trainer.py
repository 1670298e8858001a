"""The order of events in the training loop, with parts that record their calls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import GuardSettings
from ds_gpt2.engine.engine import Update
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.monitoring.step_reporter import StepReporter
from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
from ds_gpt2.training.evaluator import Evaluator
from ds_gpt2.training.guards import Guard
from ds_gpt2.training.hooks import Hook, HookFailedError, Interrupted
from ds_gpt2.training.trainer import Ending, Trainer, TrainingSchedule

OFF = GuardSettings(spike="off", divergence="off", skipped_run="off", frozen="off", drift="off", stuck_data="off")


class Parts:
    """Replaces every part of a training run; ``notes`` lists the calls in order."""

    def __init__(
        self, stop_at: int = 0, skip_at: int = 0, stop_within: int = 0, best_at: int = 0, epoch_steps: int = 10
    ) -> None:
        self.notes: list[str] = []
        self.records: dict[int, dict[str, Any]] = {}
        self.saved_states: list[dict[str, Any]] = []
        self.run_dir = Path("no such directory")
        self.every, self.directory = Every(2), Path("checkpoints")
        self.plan = SimpleNamespace(tokens_per_step=100)
        self._stop_at, self._skip_at, self._stop_within = stop_at, skip_at, stop_within
        self._best_at, self._epoch_steps, self._saved = best_at, epoch_steps, (-1, True)
        self.disk_is_full = False
        self.complete: bool | None = None
        self.step, self.requested = 0, False
        self.problem: str | None = None  # reading the data
        self.failing_saves = 0
        self.unreadable_at = 0  # the batch whose data cannot be read
        self.failing_at = 0  # the step at which a hook fails
        self.interrupted_at = 0  # the step at which a stop interrupts the evaluation
        self.can_be_repeated = True

    def epoch(self, step: int) -> float:
        return step / self._epoch_steps

    def windows_of(self, batch: int) -> np.ndarray:
        return np.array([batch])

    def micro_batches(self, batch: int) -> str:
        self.problem = "shard cannot be read" if batch == self.unreadable_at else None
        return f"data of {batch}"

    def source_metrics(self, batch: int) -> dict[str, float]:
        return {}

    def begin_step(self, step: int, batch: int) -> None:
        self.step = step

    def accumulate(self, micro_batches: str, interrupted: Callable[[], bool]) -> torch.Tensor | None:
        self.notes.append(f"accumulate {micro_batches}")
        self.requested = self.step in (self._stop_at, self._stop_within)
        return None if self.step == self._stop_within and interrupted() else torch.tensor(2.0)

    def apply(self, lr: float, accept: Callable[[float], bool]) -> Update:
        assert accept(1.0)
        self.notes.append(f"apply {lr}")
        return Update(applied=self.step != self._skip_at, grad_norm=1.0, clipped=False)

    def skip_update(self, lr: float) -> Update:
        self.notes.append("skip update")
        return Update(applied=False, grad_norm=math.inf, clipped=False)

    def discard_step(self) -> None:
        self.notes.append("discard step")

    def has_finite_weights(self) -> bool:
        return True

    device = torch.device("cpu")

    def fingerprint(self) -> str:
        return f"weights of {self.step}"

    name = "validation loss"
    is_bounded = True

    def observe(self, engine: Any, state: TrainState) -> dict[str, float]:
        self.notes.append(f"observe {state.step}")
        if state.step == self.failing_at:
            raise HookFailedError("rank 1: no memory is left")
        return {"val/loss": 3.0} if state.step == self._best_at else {"hellaswag/acc": 0.25}

    def write(self, step: int, seen: dict[str, Any]) -> None:
        self.notes.append(f"write {step}")
        self.records[step] = seen

    def save(self, state: TrainState, epoch: float, roles: Sequence[str] = ()) -> None:
        if self.failing_saves:
            self.failing_saves -= 1
            self.notes.append("cannot save")
        elif not self.has_saved(state):
            self._note_save("save", state, roles)

    def add_evaluation(self, state: TrainState, roles: Sequence[str] = ()) -> bool:
        if self._saved != (state.step, False) or state.unevaluated is not None:
            return False
        self._note_save("complete", state, roles)
        return True

    def _note_save(self, verb: str, state: TrainState, roles: Sequence[str]) -> None:
        self.notes.append(" ".join([f"{verb} {state.step}", *roles]))
        self._saved = state.step, state.unevaluated is None
        self.saved_states.append(state.to_dict())

    def has_saved(self, state: TrainState) -> bool:
        return self._saved == (state.step, state.unevaluated is None)

    def finish(self, state: TrainState, complete: bool) -> bool:
        self.complete = complete
        return not self.disk_is_full

    def report(self, step: int, text: str) -> None:
        self.notes.append(f"failed {step}: {text}")

    def before_update(self, engine: Any) -> None:
        self.notes.append("observe gradients")

    def waiting_for(self, items: str) -> str:
        return items

    def enter(self, phase: str) -> None: ...
    def beat(self) -> None: ...
    def flush(self, durable: bool = False) -> None: ...
    def mark(self, phase: str) -> None: ...
    def begin(self) -> None: ...
    def end(self, step: int) -> dict[str, float]:
        return {"perf/step_ms": 1.0}

    def eta(self, step: int, steps: int) -> float:
        return float(steps - step)

    def show(self, step: int, seen: dict[str, Any], eta: float) -> None: ...


class _LastHook(Hook):
    """A stop may interrupt it, after the other hook has validated."""

    every = Every(2)
    name = "samples"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def observe(self, engine: Any, state: TrainState) -> StepMetrics:
        if state.step == self._parts.interrupted_at:
            raise Interrupted
        return {"samples/0": "text"}


def _train(parts: Parts, state: TrainState, steps: int, save: int, guard: Guard | None = None) -> Ending:
    same: Any = parts
    schedule = TrainingSchedule(steps, lambda step: step / 10, Every(save), stop_seconds=90)
    evaluator = Evaluator([same, _LastHook(parts)], EvaluationAttempts(parts.run_dir), parts.report)
    reporter = StepReporter(same, same, same, same, steps)
    return Trainer(schedule, same, same, guard or Guard(OFF, print), evaluator, same, reporter, same).train(state)


def test_the_events_of_a_step_are_in_order() -> None:
    parts = Parts()
    assert _train(parts, TrainState(), steps=3, save=3) is Ending.DONE
    assert parts.notes == [
        "accumulate data of 1", "apply 0.1", "write 1",
        "accumulate data of 2", "observe gradients", "apply 0.2", "observe 2", "write 2",
        "accumulate data of 3", "observe gradients", "apply 0.3", "save 3", "observe 3", "write 3", "complete 3",
    ]  # fmt: skip
    assert parts.records[2] == {
        "train/loss": 2.0, "train/perplexity": math.exp(2), "train/lr": 0.2, "train/grad_norm": 1.0,
        "train/clipped_share": 0, "train/skipped_steps": 0, "train/tokens": 200, "train/epoch": 0.2,
        "perf/step_ms": 1.0, "hellaswag/acc": 0.25, "samples/0": "text",
    }  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stop_saves_the_step_that_just_ended(stop_at: int) -> None:
    parts, state = Parts(stop_at), TrainState()
    assert _train(parts, state, steps=100, save=50) is Ending.STOPPED
    assert (state.step, parts.complete) == (stop_at, False)
    assert parts.notes[-2:] == [f"write {stop_at}", f"save {stop_at}"]


def test_a_stop_in_the_last_step_ends_the_run_as_done() -> None:
    parts = Parts(stop_at=3)
    assert _train(parts, TrainState(), steps=3, save=0) is Ending.DONE
    assert parts.complete is True


def test_a_stop_within_a_step_discards_it_and_saves_the_previous_one() -> None:
    parts, state = Parts(stop_within=4), TrainState()
    assert _train(parts, state, steps=100, save=50) is Ending.STOPPED
    assert parts.notes[-2:] == ["accumulate data of 4", "save 3"]
    assert (state.step, state.tokens) == (3, 300)


def test_the_best_step_and_epoch_ends_are_saved_independently_of_the_interval() -> None:
    parts = Parts(best_at=4, epoch_steps=5)
    assert _train(parts, TrainState(), steps=12, save=0) is Ending.DONE
    saves = [note for note in parts.notes if note.startswith(("save", "complete"))]
    assert saves == [
        "save 4 best_model", "save 5 epoch_00001", "save 10", "complete 10 epoch_00002", "save 12",
    ]  # fmt: skip


def test_a_step_that_is_due_is_saved_before_its_evaluation() -> None:
    parts = Parts(best_at=4, epoch_steps=4)
    assert _train(parts, TrainState(), steps=4, save=4) is Ending.DONE
    assert parts.notes[-4:] == ["save 4", "observe 4", "write 4", "complete 4 epoch_00001 best_model"]
    unevaluated = TrainState.from_dict(parts.saved_states[0])
    assert unevaluated.unevaluated is not None and unevaluated.val_loss is None
    assert parts.saved_states[1]["unevaluated"] is None and parts.saved_states[1]["val_loss"] == 3.0
    again = Parts(best_at=4, epoch_steps=4)  # the process ended during the evaluation
    assert _train(again, unevaluated, steps=4, save=4) is Ending.DONE
    assert again.notes == ["save 4", "observe 4", "write 4", "complete 4 epoch_00001 best_model"]
    assert again.records == {4: parts.records[4]}


def test_an_unsaved_last_state_is_reported() -> None:
    parts = Parts()
    parts.disk_is_full = True
    assert _train(parts, TrainState(), steps=3, save=3) is Ending.UNSAVED


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses in seconds, on a clock that advances only during pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("ds_gpt2.training.trainer.time.sleep", pauses.append)
    monkeypatch.setattr("ds_gpt2.training.trainer.time.monotonic", lambda: sum(pauses))
    return pauses


def test_saving_the_last_state_is_retried(pauses: list[float]) -> None:
    parts = Parts()
    parts.failing_saves = 4
    assert _train(parts, TrainState(), steps=3, save=0) is Ending.DONE
    assert parts.notes[-5:] == ["cannot save"] * 4 + ["save 3"]
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize(("stop_at", "limit"), [(0, 1800), (3, 90)])
def test_retries_of_the_last_save_end_after_the_limit(pauses: list[float], stop_at: int, limit: int) -> None:
    parts = Parts(stop_at=stop_at)
    parts.failing_saves, parts.disk_is_full = 1000, True
    assert _train(parts, TrainState(), steps=9, save=0) is Ending.UNSAVED
    assert limit - 30 < sum(pauses) <= limit and max(pauses) <= 30


def test_unreadable_data_loses_no_completed_step() -> None:
    parts, state = Parts(), TrainState()
    parts.unreadable_at = 5
    with pytest.raises(UserError, match="shard cannot be read"):
        _train(parts, state, steps=9, save=0)
    assert (state.step, state.batch) == (4, 4)
    assert parts.notes[-3:] == ["accumulate data of 5", "discard step", "save 4"]


def test_a_stop_while_data_is_unreadable_is_reported_as_a_stop() -> None:
    parts, state = Parts(stop_at=4), TrainState()
    parts.unreadable_at = 4
    assert _train(parts, state, steps=9, save=0) is Ending.STOPPED
    assert parts.notes[-2:] == ["discard step", "save 3"]


def test_a_failing_hook_costs_only_its_metrics() -> None:
    parts = Parts()
    parts.failing_at = 4
    assert _train(parts, TrainState(), steps=6, save=4) is Ending.DONE
    start = parts.notes.index("save 4")
    failure = "failed 4: no validation loss: rank 1: no memory is left"
    assert parts.notes[start : start + 5] == ["save 4", "observe 4", failure, "write 4", "complete 4"]
    assert "hellaswag/acc" not in parts.records[4] and parts.records[4]["samples/0"] == "text"
    assert parts.records[6]["hellaswag/acc"] == 0.25


@pytest.mark.parametrize(("interrupted_at", "before"), [(4, (None, None)), (6, (4, 3.0))])
@pytest.mark.parametrize("save", [2, 5])
def test_an_interrupted_evaluation_is_repeated_after_the_resume(
    interrupted_at: int, before: tuple[int | None, float | None], save: int
) -> None:
    undisturbed = Parts(best_at=4, epoch_steps=4)
    undisturbed_state = TrainState()
    assert _train(undisturbed, undisturbed_state, steps=6, save=save) is Ending.DONE

    parts, state = Parts(best_at=4, epoch_steps=4), TrainState()
    parts.interrupted_at = interrupted_at
    assert _train(parts, state, steps=6, save=save) is Ending.STOPPED
    assert (state.step, parts.complete) == (interrupted_at, False)
    assert set(parts.notes[-2:]) == {f"observe {interrupted_at}", f"save {interrupted_at}"}
    assert interrupted_at not in parts.records and (state.best_step, state.val_loss) == before

    resumed = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert _train(parts, resumed, steps=6, save=save) is Ending.STOPPED  # interrupted again
    parts.interrupted_at = 0
    assert _train(parts, resumed, steps=6, save=save) is Ending.DONE
    assert parts.records == undisturbed.records and resumed == undisturbed_state
    saves = {note.split(" ", 1)[1] for note in parts.notes if note.startswith(("save", "complete"))}
    assert {note.split(" ", 1)[1] for note in undisturbed.notes if note.startswith(("save", "complete"))} <= saves


def test_a_hook_that_cannot_be_repeated_is_not_repeated() -> None:
    parts = Parts()
    parts.can_be_repeated = False
    assert _train(parts, TrainState(step=4, batch=4, unevaluated={"train/loss": None}), steps=4, save=0) is Ending.DONE
    assert parts.notes == ["save 4", "write 4", "complete 4"] and parts.records[4]["train/loss"] == math.inf


def test_a_resumed_run_starts_with_the_next_step() -> None:
    parts = Parts()
    assert _train(parts, TrainState(step=5, batch=5, tokens=500), steps=6, save=0)
    assert parts.notes[0] == "accumulate data of 6"
    assert parts.records[6]["train/tokens"] == 600


def test_a_finished_run_trains_no_step() -> None:
    parts = Parts()
    assert _train(parts, TrainState(step=6), steps=6, save=1)
    assert parts.notes == ["save 6"]  # a no-op in the real manager: the checkpoint exists


def test_a_skipped_update_is_counted() -> None:
    parts, state = Parts(skip_at=2), TrainState()
    _train(parts, state, steps=3, save=0)
    assert [parts.records[step]["train/skipped_steps"] for step in (1, 2, 3)] == [0, 1, 1]


def _losses_of(parts: Parts, values: dict[int, float]) -> None:
    def accumulate(micro_batches: str, interrupted: Callable[[], bool]) -> torch.Tensor:
        parts.notes.append(f"accumulate {micro_batches}")
        return torch.tensor(values.get(parts.step, 2.0))

    parts.accumulate = accumulate  # type: ignore[method-assign]  # other losses


def test_a_rollback_ends_without_saving() -> None:
    parts, state = Parts(epoch_steps=1000), TrainState()
    _losses_of(parts, dict.fromkeys(range(41, 60), 9.0))
    guard = Guard(GuardSettings(divergence_steps=5), lambda _: None)
    assert _train(parts, state, steps=100, save=45, guard=guard) is Ending.ROLLBACK
    assert [note for note in parts.notes if note.startswith("save")] == []
    assert (state.step, parts.complete) == (45, False)


def test_differing_weights_are_not_saved() -> None:
    parts = Parts()

    class TwoDifferent(Guard):
        def check_weights(self, state: TrainState, fingerprints: Sequence[str]) -> None:
            super().check_weights(state, ["a", "b"])

    guard = TwoDifferent(GuardSettings(), lambda _: None)
    assert _train(parts, TrainState(), steps=10, save=5, guard=guard) is Ending.ROLLBACK
    assert [note for note in parts.notes if note.startswith("save")] == []
    assert guard.rollback is not None and guard.rollback.first_step == 5


def test_a_non_finite_loss_skips_the_update() -> None:
    parts, state = Parts(), TrainState()
    _losses_of(parts, {2: math.nan})
    _train(parts, state, steps=3, save=0)
    assert [parts.records[step]["train/skipped_steps"] for step in (1, 2, 3)] == [0, 1, 1]


def test_excluded_batches_are_not_trained_on_and_the_epoch_end_is_still_saved() -> None:
    parts, state = Parts(epoch_steps=5), TrainState()
    state.exclude([5])
    _train(parts, state, steps=5, save=0)
    assert [note for note in parts.notes if note.startswith("accumulate")][-2:] == [
        "accumulate data of 4",
        "accumulate data of 6",
    ]
    assert "complete 5 epoch_00001" in parts.notes
    assert parts.records[5]["train/epoch"] == 1.2
