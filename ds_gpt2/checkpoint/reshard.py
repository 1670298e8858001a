"""ZeRO partitions of an optimizer, cut anew for another number of ranks.

Under ZeRO-1/2 the parameters of a group lie end to end in one flat vector, zeros at its end fill it up to a multiple of
the ranks, and each rank owns one equal part (deepspeed/runtime/zero/stage_1_and_2.py). So the parts of N ranks joined,
cut to their true length and filled up again are the parts of M ranks, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Keys of DeepSpeed's optimizer files (deepspeed/checkpoint/constants.py).
STATE, BASE, MASTERS = "optimizer_state_dict", "base_optimizer_state", "single_partition_of_fp32_groups"
_PADDINGS, COUNT = "param_alignment_paddings", "partition_count"


def repartition(saved: Sequence[dict[str, Any]], rank: int, sizes: Sequence[int]) -> dict[str, Any]:
    """What rank ``rank`` would have saved had there been as many ranks as there are now.

    Args:
        saved: the content of every saved rank's file, in rank order.
        sizes: elements of a rank's part of each parameter group, as the engine is partitioned now.

    Raises:
        ValueError: the files are not partitions of one optimizer, or are laid out in a way this does not know.
    """
    states = [content[STATE] for content in saved]
    first = states[0]
    if any(any(padding) for padding in first.get(_PADDINGS, ())):
        raise ValueError("zero_optimization.parameter_alignment is on: resume on the number of ranks that saved")
    groups = range(len(first[MASTERS]))
    lengths = [sum(state[MASTERS][group].numel() for state in states) for group in groups]
    masters = [
        _part([state[MASTERS][group] for state in states], lengths[group], rank, sizes[group]) for group in groups
    ]
    moments = {
        group: _moments([state[BASE]["state"][group] for state in states], lengths[group], rank, sizes[group])
        for group in first[BASE]["state"]
    }
    paddings = [max(0, size * (rank + 1) - length) for size, length in zip(sizes, lengths, strict=True)]
    unpadded = [master[: max(0, len(master) - padding)] for master, padding in zip(masters, paddings, strict=True)]
    state = {**first, MASTERS: unpadded, BASE: {**first[BASE], "state": moments}, "group_paddings": paddings}
    state.pop(COUNT, None)
    return {**saved[0], STATE: state}


def _moments(saved: Sequence[dict[str, Any]], length: int, rank: int, size: int) -> dict[str, Any]:
    """One group's optimizer state: flat vectors are cut anew, the step count is everyone's."""
    first = saved[0]
    return {
        key: _part([part[key] for part in saved], length, rank, size)
        if isinstance(value, torch.Tensor) and value.dim() == 1
        else value
        for key, value in first.items()
    }


def _part(parts: Sequence[torch.Tensor], length: int, rank: int, size: int) -> torch.Tensor:
    """Elements ``rank x size`` to ``(rank + 1) x size`` of the joined ``parts``, zeros beyond ``length``."""
    whole = torch.cat(list(parts))
    if len(whole) < length:
        raise ValueError(f"partitions have {len(whole)} elements, {length} were expected")
    result = whole.new_zeros(size)
    mine = whole[:length][rank * size : (rank + 1) * size]
    result[: len(mine)] = mine
    return result
