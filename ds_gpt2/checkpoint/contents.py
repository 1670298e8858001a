"""What hashes cannot show: files of another step, of another number of ranks, or of another size.

DeepSpeed loads what it finds; a partition that is too short would leave weights as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_gpt2.checkpoint.manifest import Manifest
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.checkpoint.reshard import BASE, COUNT, MASTERS, STATE

CLIENT_KEY = "ds_gpt2"  # our one key in DeepSpeed's client state
_COMPARED = ("step", "batch", "tokens", "ledger")  # of TrainState
_PADDINGS, _WORLD = "group_paddings", "dp_world_size"  # DeepSpeed's (deepspeed/checkpoint/constants.py)


def problem_of_model(content: Any, known: Manifest) -> str | None:
    """Why the file of weights is not that of ``known``; None if it is."""
    try:
        state, ranks = content[CLIENT_KEY]["state"], content[_WORLD]
        differing = [key for key in _COMPARED if state.get(key) != known.state.get(key)]
    except (KeyError, TypeError, AttributeError):
        return f"has no state to compare with {MANIFEST}"
    if differing:
        key = differing[0]
        return f"is of {key} {str(state.get(key))[:40]}, {MANIFEST} says {str(known.state.get(key))[:40]}"
    return None if ranks == known.world_size else f"was saved by {ranks} ranks, {MANIFEST} says {known.world_size}"


def problem_of_partition(content: Any, known: Manifest) -> str | None:
    """Why a rank's file of optimizer state is not one of ``known``; None if it is."""
    try:
        state = content[STATE]
        masters, moments, counts = state[MASTERS], state[BASE]["state"], state.get(COUNT)
        paddings = state.get(_PADDINGS, [0] * len(masters))
        if counts is not None and any(count != known.world_size for count in counts):
            return f"was saved by {counts[0]} ranks, {MANIFEST} says {known.world_size}"
        for group, master in enumerate(masters):
            sizes = {master.numel(), master.numel() + int(paddings[group])}
            for name, moment in moments[group].items():
                if name.startswith("exp_avg") and moment.numel() not in sizes:  # Adam's, one for each weight
                    return f"has {moment.numel():,} elements of {name} for {master.numel():,} weights"
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        return "is no partition of an optimizer"
    return None


def elements(content: Mapping[str, Any]) -> int:
    """Master weights in a rank's file."""
    return sum(master.numel() for master in content[STATE][MASTERS])


def problem_of_sum(found: int, model: Mapping[str, Any]) -> str | None:
    """Why ``found`` master weights of all ranks are not those of the file of weights; None if they are."""
    wanted = sum(tensor.numel() for tensor in model["module"].values())
    return None if found == wanted else f"its partitions have {found:,} weights, the model has {wanted:,}"
