"""Repartition ZeRO optimizer state for another number of ranks.

Under ZeRO-1/2 the parameters of a group are concatenated to one flat vector, which is padded with zeros to a multiple
of the number of ranks; each rank owns one equal part (deepspeed/runtime/zero/stage_1_and_2.py). The parts of N ranks,
concatenated, truncated to the true length and padded again, are the parts of M ranks, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ds_gpt2.engine.checkpoint_keys import ALIGNMENT_PADDINGS, BASE, COUNT, EMA, GROUP_PADDINGS, MASTERS, STATE


def repartition(saved: Sequence[dict[str, Any]], rank: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the optimizer file of ``rank`` for the current number of ranks.

    Args:
        saved: the content of the optimizer file of every rank that saved, in rank order.
        sizes: for each parameter group, the number of elements of one rank's part in the current engine.

    Raises:
        ValueError: the files are not partitions of one optimizer, or have an unsupported layout.
    """
    states = [content[STATE] for content in saved]
    first = states[0]
    if any(any(padding) for padding in first.get(ALIGNMENT_PADDINGS, ())):
        raise ValueError("zero_optimization.parameter_alignment is set: resume with the number of ranks that saved")
    groups = range(len(first[MASTERS]))
    lengths = [sum(state[MASTERS][group].numel() for state in states) for group in groups]
    paddings = [max(0, size * (rank + 1) - length) for size, length in zip(sizes, lengths, strict=True)]

    def unpadded(group: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        part = _part(parts, lengths[group], rank, sizes[group])
        return part[: max(0, len(part) - paddings[group])]

    masters = [unpadded(group, [state[MASTERS][group] for state in states]) for group in groups]
    averages = (
        {EMA: [unpadded(group, [one[EMA][group] for one in saved]) for group in groups]} if EMA in saved[0] else {}
    )
    moments = {
        group: _moments([state[BASE]["state"][group] for state in states], lengths[group], rank, sizes[group])
        for group in first[BASE]["state"]
    }
    state = {**first, MASTERS: masters, BASE: {**first[BASE], "state": moments}, GROUP_PADDINGS: paddings}
    state.pop(COUNT, None)
    return {**saved[0], STATE: state, **averages}


def _moments(saved: Sequence[dict[str, Any]], length: int, rank: int, size: int) -> dict[str, Any]:
    """Return the optimizer state of one group: flat vectors are repartitioned, scalars are the same on all ranks."""
    first = saved[0]
    return {
        key: _part([part[key] for part in saved], length, rank, size)
        if isinstance(value, torch.Tensor) and value.dim() == 1
        else value
        for key, value in first.items()
    }


def _part(parts: Sequence[torch.Tensor], length: int, rank: int, size: int) -> torch.Tensor:
    """Return elements ``rank x size`` to ``(rank + 1) x size`` of the concatenated parts, zeros beyond ``length``."""
    whole = torch.cat(list(parts))
    if len(whole) < length:
        raise ValueError(f"partitions have {len(whole)} elements, expected {length}")
    result = whole.new_zeros(size)
    mine = whole[:length][rank * size : (rank + 1) * size]
    result[: len(mine)] = mine
    return result
