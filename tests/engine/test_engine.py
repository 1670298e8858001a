"""The engine on real ranks: what ranks_engine.py saw on one, two and four of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, launch

pytestmark = pytest.mark.ranks

Seen = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Seen:
    folder = tmp_path_factory.mktemp("engine")
    config = write_config(folder, monitor={"tensorboard": False})
    results = {}
    for ranks in (1, 2, 4):
        out = folder / f"{ranks}.json"
        launched = launch(ranks, str(config), str(out), script=PROJECT / "tests" / "ranks_engine.py")
        assert launched.code == 0, launched.output
        results[ranks] = json.loads(out.read_text())
        assert results[ranks]["world_size"] == ranks
    return results


def test_the_first_loss_does_not_depend_on_the_number_of_ranks(seen: Seen) -> None:
    losses = [seen[ranks]["steps"][0][0] for ranks in seen]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(50_257), abs=0.3)


def test_weights_of_another_model_are_set_exactly(seen: Seen) -> None:
    for ranks in seen:
        assert seen[ranks]["begun_from"] == {"masters": True, "rounded": True, "padding": True}


def test_training_agrees_to_bf16_noise_for_any_number_of_ranks(seen: Seen) -> None:
    one, two, four = (seen[ranks]["steps"] for ranks in (1, 2, 4))
    for other in (two, four):
        for (loss, norm), (expected_loss, expected_norm) in zip(other, one, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-3)
            assert norm == pytest.approx(expected_norm, rel=2e-2)
    assert one[-1][0] < one[0][0] - 0.05


def test_gradients_accumulate_in_fp32(seen: Seen) -> None:
    """In bf16 1 + 1/512 is 1: the small gradients would be lost."""
    for ranks in seen:
        accumulation = 16 // (2 * ranks)
        assert seen[ranks]["summed_gradient"] == pytest.approx(1 + (accumulation - 1) / 512, rel=1e-6)


def test_the_norm_is_computed_once_per_step_by_the_replacement(seen: Seen) -> None:
    """DeepSpeed asks methods that it does not promise to have: it must go on asking them."""
    assert {seen[ranks]["norms"] for ranks in seen} == {4}


def test_the_gradient_norm_is_exact_for_any_number_of_ranks(seen: Seen) -> None:
    """One fp32 sum over all of them is off by 1e-4 on a CPU, by another amount for every number of ranks.

    Sums of 4,096 squares are in fp32 still: how far off they are depends on the processor's vectors (1.4e-7 at most).
    """
    for ranks in seen:
        assert seen[ranks]["norm_error"] < 1e-6


def test_an_interrupted_step_reduces_nothing_and_leaves_no_gradient(seen: Seen) -> None:
    for ranks in seen:
        assert seen[ranks]["dropped"] == {"stopped": True, "left": 0.0, "reductions": 0}


def test_validation_is_bit_identical_for_any_number_of_ranks(seen: Seen) -> None:
    assert len({seen[ranks]["validation_before"] for ranks in seen}) == 1


def test_a_bad_micro_batch_of_one_rank_never_reaches_the_state(seen: Seen) -> None:
    """In losses and in gradients, and updates that are to be skipped; benchmarks/bad_gradients.py has 1,000."""
    for ranks in seen:
        bad = seen[ranks]["bad"]
        assert (bad["injections"], bad["updates_made"], bad["states_changed"]) == (25, 0, 0)
        assert len(bad["of"]) == 5 and bad["next_update_made"]
        assert math.isfinite(seen[ranks]["after_skip"][0][0])


def test_an_update_whose_gradient_norm_is_refused_changes_nothing(seen: Seen) -> None:
    for found in seen.values():
        refused = found["unaccepted"]
        assert refused["asked"] and refused["unchanged"] and refused["applied"] == [False, True]
        first, again = refused["norms"]
        assert math.isfinite(first) and first == again


def test_one_differing_bit_changes_the_fingerprint(seen: Seen) -> None:
    for ranks in seen:
        same, flipped, back = (seen[ranks]["fingerprints"][name] for name in ("same", "flipped", "back"))
        assert len(set(same)) == 1 and back == same
        assert flipped[-1] != same[-1] and flipped[:-1] == same[:-1]


def test_an_error_of_one_rank_is_raised_on_all(seen: Seen) -> None:
    for ranks in seen:
        expected = [[f"rank {guilty} found it"] * ranks for guilty in range(ranks)]
        assert seen[ranks]["complaints"] == expected


def test_a_hook_interrupted_on_one_rank_is_interrupted_on_all(seen: Seen) -> None:
    for ranks in seen:
        assert seen[ranks]["interrupted"] == [[True] * ranks] * ranks


def test_a_hook_that_fails_on_one_rank_fails_on_all(seen: Seen) -> None:
    for ranks in seen:
        assert seen[ranks]["failed_hook"] == [f"rank {ranks - 1}: out of memory"] * ranks


def test_histograms_and_norms_equal_those_of_whole_tensors(seen: Seen) -> None:
    for ranks in seen:
        measured, expected = seen[ranks]["histograms"]["measured"], seen[ranks]["histograms"]["expected"]
        assert measured.keys() == expected.keys()
        for tag in measured:
            assert measured[tag] == pytest.approx(expected[tag], rel=1e-4, abs=1e-6), (ranks, tag)
        assert seen[ranks]["histograms"]["counts"] == seen[ranks]["histograms"]["counted"]
        assert len(seen[ranks]["histograms"]["limits"]) == len(seen[ranks]["histograms"]["counts"]) < 300
        assert 1e-4 < measured["update_ratio/h.0"] < 0.5
