"""What a resumed run must share with its checkpoint: model, batch, seed and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_gpt2.checkpoint.catalog import STAGES, Generation
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.dataset import as_first_read
from ds_gpt2.data.sources import Sources, open_sources


def data_of(settings: Settings, found: Sequence[Generation]) -> Sources:
    """Return the run's data; of a resumed run, as its checkpoints have recorded it.

    Args:
        found: the checkpoints to resume from, the first choice first; empty for a new run.

    Raises:
        UserError: the data cannot be read.
    """
    data = open_sources(settings.data)
    known = [one.manifest.identity.get("data") for one in found if one.manifest is not None]
    if not known or data.names:
        return data
    return data.with_first(as_first_read(data.datasets[0], str(known[0])))


def identity_of(settings: Settings, data: Sources) -> dict[str, Any]:
    """Return what a resumed run must share with its checkpoint: with any other value it is another experiment."""
    layers, heads, width = settings.model.shape
    mixture = {STAGES: data.stage_identities} if data.names else {}
    return {
        "model.layers": layers,
        "model.heads": heads,
        "model.width": width,
        "batch.sequence_length": settings.batch.sequence_length,
        "batch.tokens_per_step": settings.batch.tokens_per_step,
        "run.seed": settings.run.seed,
        "data": "a mixture" if data.names else data.fingerprint,
        **mixture,
    }
