"""ZeRO partitions of a real run on four ranks, repartitioned for other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.checkpoint.reshard import repartition
from ds_gpt2.engine.checkpoint_io import partition_file, unpickle
from ds_gpt2.engine.checkpoint_keys import EMA

Partition = dict[str, Any]


@pytest.fixture(scope="module")
def saved(four_ranks: tuple[object, Path]) -> list[Partition]:
    directory = four_ranks[1] / "checkpoints" / "test" / "rolling_step_000012"
    return [_with_average(unpickle(directory / partition_file(rank))) for rank in range(4)]


def _with_average(partition: Partition) -> Partition:
    """Return the file of a run that keeps a moving average of the weights: other numbers in the form of the masters."""
    return {**partition, EMA: [1.0 - master for master in _masters(partition)]}


def _sizes(partitions: list[Partition], ranks: int) -> list[int]:
    """Return the elements per rank of each group, padded to a multiple of twice the ranks, as DeepSpeed does."""
    groups = len(_masters(partitions[0]))
    totals = [sum(len(_masters(part)[group]) for part in partitions) for group in range(groups)]
    return [-(-total // (2 * ranks)) * 2 for total in totals]


def _masters(partition: Partition) -> list[torch.Tensor]:
    return partition["optimizer_state_dict"]["single_partition_of_fp32_groups"]


def _moments(partition: Partition) -> dict[int, dict[str, torch.Tensor]]:
    return partition["optimizer_state_dict"]["base_optimizer_state"]["state"]


def _cut(partitions: list[Partition], ranks: int) -> list[Partition]:
    sizes = _sizes(partitions, ranks)
    return [repartition(partitions, rank, sizes) for rank in range(ranks)]


@pytest.mark.parametrize("ways", [[2], [1], [2, 1], [3, 8], [5, 1, 7]])
def test_repartitioning_to_other_ranks_and_back_to_four_is_exact(saved: list[Partition], ways: list[int]) -> None:
    partitions = saved
    for ranks in ways:
        partitions = _cut(partitions, ranks)
        assert len(partitions) == ranks
    for before, after in zip(saved, _cut(partitions, 4), strict=True):
        for one, other in zip(_masters(before), _masters(after), strict=True):
            assert torch.equal(one, other)
        assert len(after[EMA]) == 2
        for one, other in zip(before[EMA], after[EMA], strict=True):
            assert torch.equal(one, other)
        assert _moments(before).keys() == _moments(after).keys()
        for group, state in _moments(before).items():
            assert state.keys() == _moments(after)[group].keys()
            for key, value in state.items():
                assert torch.equal(value, _moments(after)[group][key]), key


def test_repartitioning_to_one_rank_is_complete(saved: list[Partition]) -> None:
    (alone,) = _cut(saved, 1)
    for group, master in enumerate(_masters(alone)):
        assert torch.equal(master, torch.cat([_masters(part)[group] for part in saved]))
    assert _moments(alone)[0]["step"] == 12


@given(length=st.integers(1, 60), before=st.integers(1, 6), after=st.integers(1, 6))
def test_repartitioning_for_any_length_and_number_of_ranks(length: int, before: int, after: int) -> None:
    whole = torch.arange(1.0, length + 1)
    parts = [_synthetic(whole, rank, before) for rank in range(before)]
    cut = _cut(parts, after)
    assert torch.equal(torch.cat([_masters(part)[0] for part in cut]), whole)
    assert not [part for part in cut if EMA in part]
    averaged = _cut([_with_average(part) for part in parts], after)
    assert torch.equal(torch.cat([part[EMA][0] for part in averaged]), 1.0 - whole)
    moments = torch.cat([_moments(part)[0]["exp_avg"] for part in cut])
    assert torch.equal(moments[:length], whole)
    assert not moments[length:].any()
    assert len(moments) % (2 * after) == 0


def _synthetic(whole: torch.Tensor, rank: int, ranks: int) -> Partition:
    size = -(-len(whole) // (2 * ranks)) * 2
    mine = whole[rank * size : (rank + 1) * size]
    padded = torch.cat([mine, torch.zeros(size - len(mine))])
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": padded}}, "param_groups": []}
    return {"optimizer_state_dict": {"single_partition_of_fp32_groups": [mine], "base_optimizer_state": state}}


def test_an_unknown_layout_is_refused(saved: list[Partition]) -> None:
    state = {**saved[0]["optimizer_state_dict"], "param_alignment_paddings": [[0, 3], [0]]}
    with pytest.raises(ValueError, match="parameter_alignment is set"):
        repartition([{**saved[0], "optimizer_state_dict": state}], 0, _sizes(saved, 1))
