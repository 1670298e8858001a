"""The validation hook: its reports, and its records in the train state."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import ValidationSettings
from ds_gpt2.data import tokenizer
from ds_gpt2.data.sources import HeldOut
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.loss import perplexity
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
from ds_gpt2.training.evaluator import Evaluator
from ds_gpt2.training.hooks import HookFailedError, Interrupted, Validation


class Windows:
    """A validation split of ten windows."""

    sequence_length = 64

    def __len__(self) -> int:
        return 10


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the hook with replaced measurements: the losses in ``values``, in order."""
    windows: Any = Windows()
    hook = Validation(ValidationSettings(every=5, tokens=640), [HeldOut(windows)], group=2)
    measured = SimpleNamespace(hook=hook, values=[])
    monkeypatch.setattr(hook, "losses", lambda engine: [measured.values.pop(0)])
    return measured


def test_a_non_finite_loss_is_reported_and_not_the_best(
    tmp_path: Path, validation: Any, log_messages: list[str]
) -> None:
    state = TrainState()
    validation.values = [3.0, math.nan, math.inf, 2.5]
    engine: Any = SimpleNamespace()
    metrics: list[StepMetrics] = []
    for state.step in (5, 10, 15, 20):
        metrics.append({})
        evaluator = Evaluator([validation.hook], EvaluationAttempts(tmp_path), lambda step, text: pytest.fail(text))
        evaluator.evaluate([validation.hook], engine, state, metrics[-1])
    assert ["marks/best" in each for each in metrics] == [True, False, False, True]
    assert metrics[1] == {
        "val/loss": pytest.approx(math.nan, nan_ok=True),
        "val/perplexity": pytest.approx(math.nan, nan_ok=True),
    }
    assert (state.best_val_loss, state.best_step) == (2.5, 20)
    assert log_messages == [
        "step 5: validation loss 3.0000  (best so far)",
        "step 10: the validation loss is nan, not a finite number; best so far: 3.0000 at step 5",
        "step 15: the validation loss is inf, not a finite number; best so far: 3.0000 at step 5",
        "step 20: validation loss 2.5000  (best so far)",
    ]


def test_the_perplexity_of_nan_is_nan() -> None:
    assert math.isnan(perplexity(math.nan))
    assert perplexity(math.inf) == perplexity(800.0) == math.inf
    assert perplexity(0.0) == 1.0


def test_a_first_non_finite_loss_sets_no_best(validation: Any, log_messages: list[str]) -> None:
    validation.values = [math.nan]
    state = TrainState(step=5)
    validation.hook.observe(SimpleNamespace(), state)
    assert state.best_step is None
    assert log_messages == ["step 5: the validation loss is nan, not a finite number; best so far: none yet"]


class Text(Windows):
    """Windows of text; window number n starts with token n, and the next is <|endoftext|>."""

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self.reads = getattr(self, "reads", 0) + 1
        rest = np.resize(tokenizer.gpt2().encode_ordinary("Tea in the café, naïvely."), 63)
        rest = np.tile(rest, (len(indices), 1))
        return np.concatenate([indices[:, None], np.full((len(indices), 1), tokenizer.END_OF_TEXT), rest], axis=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bits_per_byte_count_the_bytes_of_all_target_tokens(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: Any = Text()
    decode = tokenizer.gpt2().decode_tokens_bytes
    targets = windows.read(np.arange(10))[:, 2:]  # the first target is <|endoftext|>, which counts 0 bytes
    size = sum(len(b"".join(decode(row))) for row in targets.tolist())
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    hooks = [Validation(ValidationSettings(every=5, tokens=640), [HeldOut(windows)], group=2) for _ in range(ranks)]
    engine: Any = SimpleNamespace(model=_Constant(), device=torch.device("cpu"))
    for rank, hook in enumerate(hooks):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        hook._losses(engine, range(len(hook._groups)))
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda values: values)
    hooks[0]._group_bytes = torch.stack([hook._group_bytes for hook in hooks]).sum(dim=0)
    hooks[0]._bytes_per_token = hooks[0]._count_bytes(engine)
    assert hooks[0]._bits_per_byte(3.0) == {"val/bits_per_byte": pytest.approx(3.0 * 640 / math.log(2) / size)}


def test_bytes_are_counted_at_the_first_validation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: Any = Text()
    hook = Validation(ValidationSettings(every=5, tokens=640), [HeldOut(windows)], group=2)
    engine: Any = SimpleNamespace(model=_Constant(), device=torch.device("cpu"))
    first = hook.observe(engine, TrainState(step=5))
    assert windows.reads == 5  # the windows that are evaluated anyway
    monkeypatch.setattr("ds_gpt2.training.hooks.validation.count_bytes", lambda windows: 1 / 0)
    again = hook.observe(engine, TrainState(step=10))
    assert first["val/bits_per_byte"] == again["val/bits_per_byte"]
    assert first["val/loss"] == 3.0


class _Constant(torch.nn.Module):
    """A model whose loss is 3."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        return 3.0


@pytest.mark.parametrize("stop_requested", [False, True])
def test_a_stop_while_a_shard_is_unreadable_interrupts_validation(stop_requested: bool) -> None:
    class Unreadable(Windows):
        is_stop_requested = False

        def read(self, indices: object) -> None:
            self.is_stop_requested = stop_requested
            raise UserError("a shard cannot be read")

    def progress() -> None:
        if windows.is_stop_requested:
            raise Interrupted

    windows: Any = Unreadable()
    hook = Validation(ValidationSettings(every=5, tokens=640), [HeldOut(windows)], group=2)
    hook.progress = progress
    engine: Any = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Identity())
    with pytest.raises(
        Interrupted if stop_requested else HookFailedError,
        match=None if stop_requested else "rank 0: a shard cannot be read",
    ):
        hook.loss(engine)
    assert engine.model.training
