"""Checks of the content of checkpoint files that hashes cannot replace: another step, world size, or tensor size.

DeepSpeed does not check these: a partition that is too short would leave weights unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_gpt2.checkpoint.manifest import Manifest
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.engine.checkpoint_keys import BASE, COUNT, EMA, GROUP_PADDINGS, MASTERS, MODULE, STATE, WORLD_SIZE

CLIENT_KEY = "ds_gpt2"  # this project's only key in DeepSpeed's client state
_COMPARED = ("step", "batch", "tokens", "ledger")  # fields of TrainState


def problem_of_model(content: Any, manifest: Manifest) -> str | None:
    """Return why the content of the model file does not match ``manifest``; None if it does."""
    try:
        state, ranks = content[CLIENT_KEY]["state"], content[WORLD_SIZE]
        differing = [key for key in _COMPARED if state.get(key) != manifest.state.get(key)]
    except (KeyError, TypeError, AttributeError):
        return f"has no state to compare with {MANIFEST}"
    if differing:
        key = differing[0]
        return f"has {key} {str(state.get(key))[:40]}, {MANIFEST} has {str(manifest.state.get(key))[:40]}"
    return None if ranks == manifest.world_size else _wrong_world_size(ranks, manifest)


def problem_of_partition(content: Any, manifest: Manifest) -> str | None:
    """Return why the content of a rank's optimizer file does not match ``manifest``; None if it does."""
    try:
        state = content[STATE]
        masters, moments, counts = state[MASTERS], state[BASE]["state"], state.get(COUNT)
        paddings = state.get(GROUP_PADDINGS, [0] * len(masters))
        if counts is not None and any(count != manifest.world_size for count in counts):
            return _wrong_world_size(counts[0], manifest)
        for group, master in enumerate(masters):
            sizes = {master.numel(), master.numel() + int(paddings[group])}
            for name, moment in moments[group].items():
                if name.startswith("exp_avg") and moment.numel() not in sizes:  # Adam's moments: one element a weight
                    return f"has {moment.numel():,} elements of {name} for {master.numel():,} weights"
        average = [part.numel() for part in content.get(EMA, ())]
        if average != ([master.numel() for master in masters] if manifest.has_ema else []):
            return (
                f"has {sum(average):,} elements of the moving average for {elements(content):,} weights, {MANIFEST} has"
                f" ema.decay {manifest.ema_decay}"
            )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        return "is not an optimizer partition"
    return None


def elements(content: Mapping[str, Any]) -> int:
    """Return the number of fp32 master weights in a rank's optimizer file."""
    return sum(master.numel() for master in content[STATE][MASTERS])


def problem_of_sum(found: int, model: Mapping[str, Any]) -> str | None:
    """Return why the partitions of all ranks do not cover the model; None if they do.

    Args:
        found: the number of master weights of all ranks.
        model: the content of the model file.
    """
    expected = sum(tensor.numel() for tensor in model[MODULE].values())
    return None if found == expected else f"its partitions have {found:,} weights, the model has {expected:,}"


def _wrong_world_size(ranks: object, manifest: Manifest) -> str:
    return f"was saved by {ranks} ranks, {MANIFEST} says {manifest.world_size}"
