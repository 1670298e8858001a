"""Saving and loading with a real engine on two ranks: the results of ranks_checkpoints.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launched import PROJECT, launch

from ds_gpt2.checkpoint import manager

pytestmark = pytest.mark.ranks

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Seen:
    folder = tmp_path_factory.mktemp("store")
    config = write_config(folder, monitor={"tensorboard": False})
    script = PROJECT / "tests" / "ranks_checkpoints.py"
    launched = launch(2, str(config), str(folder / "seen.json"), script=script)
    assert launched.code == 0, launched.output
    assert launched.left_over == []
    return json.loads((folder / "seen.json").read_text())


def test_creation_times_of_checkpoints_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds also if the clock is set back between two saves."""
    checkpoints = manager.Checkpoints.__new__(manager.Checkpoints)
    checkpoints._newest_time = 0.0
    clock = iter([1000.0, 1060.0, 400.0, 460.0, 2000.0])
    monkeypatch.setattr(manager, "time", SimpleNamespace(time=lambda: next(clock)))
    assert [checkpoints._next_time() for _ in range(5)] == [1000.0, 1060.0, 1061.0, 1062.0, 2000.0]


def test_training_continues_while_the_checkpoint_is_written(seen: Seen) -> None:
    assert seen["async"] == {
        "under_way": True,
        "changed": True,
        "finished": True,
        "same": True,
        "step": 2,
        "evaluation": [True, 3.0, True],
        "tags": ["rolling_step_000002", "best_model"],
    }


def test_an_evaluation_that_cannot_be_recorded_is_recorded_later(seen: Seen) -> None:
    assert seen["unrecorded"] == {
        "committed": True,
        "recorded": False,
        "again": True,
        "tags": ["rolling_step_000001", "epoch_00001"],
        "evaluated": [True, True],
        "another": False,
        "alone": False,
    }


def test_changed_settings_take_effect_after_a_load(seen: Seen) -> None:
    assert seen["settings"] == {"weight_decay": [0.25, 0.0], "betas": [0.8, 0.9], "clip": 0.5, "moments": True}


def test_a_checkpoint_needs_at_most_14_bytes_per_parameter(seen: Seen) -> None:
    """bf16 weights, fp32 master weights and two fp32 moments, and 1% for everything else."""
    assert 1.0 < seen["sizes"]["bytes"] / (14 * seen["sizes"]["parameters"]) < 1.01


def test_a_rank_that_cannot_write_costs_only_one_checkpoint(seen: Seen) -> None:
    result = seen["one_rank_full"]
    assert result["saved"] is False
    assert result["left"] == ["best_model", "latest", "rolling_step_000002", "zero_to_fp32.py"]
    assert len(result["logged"]) == 1
    assert "training continues" in result["logged"][0]
    assert result["next"] is True
    assert result["good"] is None


def test_a_disk_slower_than_the_save_interval_delays_training_and_is_reported(seen: Seen) -> None:
    assert seen["waited"]["seconds"] > 0.1
    assert len(seen["waited"]["logged"]) == 1


def test_a_synchronous_save_has_committed_when_it_returns(seen: Seen) -> None:
    assert seen["inline"] == {"there": True, "good": None}


def test_without_free_space_old_checkpoints_are_deleted_and_the_save_is_skipped_with_an_error(seen: Seen) -> None:
    result = seen["no_room"]
    assert result["finished"] is False
    assert result["quick"] is True
    assert len(result["logged"]) == 1
    assert result["left"] == [result["restored"], "best_model"]


def test_a_slow_result_of_rank_0_reaches_every_rank(seen: Seen) -> None:
    assert set(seen["at_length"]) == {7}
