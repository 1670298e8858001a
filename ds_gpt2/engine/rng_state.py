"""The random state of a rank: Python, numpy, torch and GPU generators, as plain values that load without pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ds_gpt2.distributed import collectives


def seed_everything(seed: int) -> None:
    """Seed all generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank_seed(seed: int, step: int) -> int:
    """Return the seed of this rank from ``step`` on, which differs between ranks: their dropout must differ.

    Args:
        seed: ``run.seed``.
        step: the step of the checkpoint if its generators do not fit this number of ranks; 0 for a new run.
    """
    return seed + collectives.rank() + step * collectives.world_size()


def get_rng_state() -> dict[str, Any]:
    """Return the state of all generators of this process."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore a state that ``get_rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
