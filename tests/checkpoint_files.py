"""Write small checkpoints that were never trained."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint.manifest import FileEntry, Manifest, encode

FILES = {"mp_rank_00_model_states.pt": b"weights" * 100, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"x" * 300}
SIZE = sum(map(len, FILES.values()))
SHAPE = {"model.layers": 1, "model.heads": 2, "model.width": 8, "batch.sequence_length": 16}


def write_checkpoint(
    directory: Path, tag: str, step: int, files: dict[str, bytes] | None = None, **fields: Any
) -> Path:
    """Write a committed checkpoint of small files; ``fields`` replace fields of its manifest."""
    path = directory / tag
    path.mkdir(parents=True)
    contents = FILES if files is None else files
    for name, content in contents.items():
        (path / name).write_bytes(content)
    hour_ago = datetime.now().astimezone() - timedelta(hours=3, minutes=12)
    entries = {n: FileEntry(bytes=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in contents.items()}
    known: dict[str, Any] = {
        "created": hour_ago.isoformat(timespec="seconds"),
        "epoch": step / 400,
        "state": {"step": step, "val_loss": 4.25, "val_step": step},
        "world_size": 1,
        "identity": SHAPE,
        "settings": {"checkpoint": {"keep_last": 1, "keep_epochs": 1}},
        "versions": {},
        "files": entries,
    }
    (path / "manifest.json").write_bytes(encode(Manifest(**{**known, **fields})))
    return path


def size_of(path: Path) -> int:
    """Return the total size of the files in a directory, in bytes."""
    return sum(file.stat().st_size for file in path.iterdir())
