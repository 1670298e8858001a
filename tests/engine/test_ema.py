"""The moving average of the weights: alone, and on two ranks by the results of ranks_ema.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import PROJECT, launch

from ds_gpt2.engine.ema import WeightAverage

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Seen:
    folder = tmp_path_factory.mktemp("ema")
    config = write_config(folder, monitor={"tensorboard": False})
    launched = launch(2, str(config), str(folder / "seen.json"), script=PROJECT / "tests" / "ranks_ema.py")
    assert launched.code == 0, launched.output
    assert launched.left_over == []
    return json.loads((folder / "seen.json").read_text())


def test_an_update_moves_the_average_towards_the_weights_in_place() -> None:
    average = WeightAverage([torch.tensor([1.0, 2.0])], decay=0.75)
    part = average.parts[0]
    average.update([torch.tensor([5.0, 2.0])])
    assert part is average.parts[0] and part.tolist() == [2.0, 2.0]


def test_the_average_is_saved_without_padding_and_loaded_with_zeros() -> None:
    average = WeightAverage([torch.tensor([1.0, 2.0, 0.0])], decay=0.5)
    (saved,) = average.to_save([torch.empty(2)])
    assert saved.tolist() == [1.0, 2.0] and saved.data_ptr() == average.parts[0].data_ptr()
    other = WeightAverage([torch.full((4,), 9.0)], decay=0.5)
    other.load([saved])
    assert other.parts[0].tolist() == [1.0, 2.0, 0.0, 0.0]


def test_the_average_equals_a_reference_in_fp64(seen: Seen) -> None:
    steps = seen["steps"]
    assert steps["initial"]
    assert steps["error"] < 1e-6 < 1e-3 < steps["distance"]


def test_the_parts_of_all_ranks_are_one_copy(seen: Seen) -> None:
    steps = seen["steps"]
    assert steps["equal_parts"]
    assert 0 <= steps["elements"] - steps["parameters"] < 8, "the padding of two groups"


def test_a_skipped_update_leaves_the_average_unchanged(seen: Seen) -> None:
    assert seen["steps"]["skipped"]


def test_training_is_bitwise_the_same_with_and_without_an_average_and_its_evaluation(seen: Seen) -> None:
    steps = seen["steps"]
    assert steps["restored"] and steps["losses_equal"] and steps["weights_equal"]


def test_the_rounded_average_is_evaluated_and_the_weights_return_also_after_an_error(seen: Seen) -> None:
    expected = ("loss", "rounded", "differs", "Interrupted", "UserError", "RuntimeError")
    assert seen["evaluated"] == dict.fromkeys(expected, True)


def test_a_checkpoint_in_progress_is_copied_before_the_weights_change(seen: Seen) -> None:
    saved = seen["saved"]
    assert saved["finished"] and saved["waited"] and saved["restored"]


def test_a_checkpoint_loads_with_another_decay_and_without_an_average(seen: Seen) -> None:
    saved = seen["saved"]
    assert saved["decay"] == 0.5 and saved["plain"] and saved["next"]


def test_a_checkpoint_needs_four_more_bytes_per_parameter(seen: Seen) -> None:
    assert 1.0 < seen["saved"]["bytes"] / (18 * seen["steps"]["parameters"]) < 1.01


def test_the_average_starts_from_the_weights_of_another_model(seen: Seen) -> None:
    assert seen["initialized"]
