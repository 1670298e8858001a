"""Free disk space that a save requires."""

from __future__ import annotations

from pathlib import Path

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.config.settings import CheckpointSettings


def reserved_bytes(settings: CheckpointSettings) -> int:
    """Return the bytes that stay free on the disk of the checkpoints: ``checkpoint.min_free_gb``."""
    return int(settings.min_free_gb * 1e9)


def bytes_for_next_save(checkpoint_bytes: int, settings: CheckpointSettings) -> int:
    """Return the free bytes that a save of ``checkpoint_bytes`` requires, the reserve included."""
    return checkpoint_bytes + reserved_bytes(settings)


def newest_full_bytes(directory: Path) -> int | None:
    """Return the bytes of the newest full checkpoint in ``directory``; None if there is none."""
    full = (found.manifest for found in scan(directory) if not found.weights_only)
    return next((manifest.bytes for manifest in full if manifest is not None), None)
