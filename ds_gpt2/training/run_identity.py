"""What a resumed run must share with its checkpoint: model, batch, seed and data."""

from __future__ import annotations

from typing import Any

from ds_gpt2.checkpoint.catalog import candidates
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.dataset import Dataset, as_first_read, open_dataset


def dataset_of(settings: Settings, source: str | None) -> Dataset:
    """Return the run's data; of a resumed run, as the checkpoints that ``source`` matches have recorded it.

    Raises:
        UserError: the data cannot be read, or there is no such checkpoint.
    """
    dataset = open_dataset(settings.data.dir)
    found = candidates(settings.checkpoint_dir, source) if source is not None else []
    known = [one.manifest.identity.get("data") for one in found if one.manifest is not None]
    return as_first_read(dataset, str(known[0])) if known else dataset


def identity_of(settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """Return what a resumed run must share with its checkpoint: with any other value it is another experiment."""
    layers, heads, width = settings.model.shape
    return {
        "model.layers": layers,
        "model.heads": heads,
        "model.width": width,
        "batch.sequence_length": settings.batch.sequence_length,
        "batch.tokens_per_step": settings.batch.tokens_per_step,
        "run.seed": settings.run.seed,
        "data": dataset.fingerprint,
    }
