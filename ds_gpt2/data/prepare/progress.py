"""The progress of a preparation, and the note from which the same command continues after an interruption."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.data.dataset import Split
from ds_gpt2.data.prepare.chunking import Counts, Position
from ds_gpt2.data.prepare.output import NOTE
from ds_gpt2.data.prepare.shard_writer import Written, is_complete
from ds_gpt2.data.prepare.sources import Source

log = logging.getLogger(__name__)

_FORMAT = 2
_READER = 2  # version of the text readers; the notes of earlier versions lack it


@dataclass
class PreparationProgress:
    """How far a preparation has come. What was written after it is discarded when the preparation continues."""

    position: Position = field(default_factory=Position)
    pieces: int = 0
    previous: Split | None = None  # split of the previous piece
    counts: Counts = field(default_factory=Counts)
    splits: dict[Split, Written] = field(default_factory=lambda: {"val": Written(), "train": Written()})
    separated: bool = False  # whether --separator has occurred

    @property
    def tokens(self) -> int:
        """Tokens written to both splits."""
        return sum(written.total for written in self.splits.values())


def identity_of(source: Source, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for a preparation to continue, as it is after a round trip through JSON."""
    return dict(json.loads(json.dumps({"source": source.identity(), "recipe": recipe})))


def write_note(directory: Path, identity: dict[str, Any], progress: PreparationProgress) -> None:
    """Write the note of ``progress`` durably. The shards must have been synchronized before."""
    note = {
        "format": _FORMAT,
        "reader": _READER,
        "identity": identity,
        "place": asdict(progress.position),
        "pieces": progress.pieces,
        "previous": progress.previous,
        "counts": asdict(progress.counts),
        "splits": {split: written.to_dict() for split, written in progress.splits.items()},
        "separated": progress.separated,
    }
    replace_file(directory / NOTE, json.dumps(note), durable=True)


def read_note(directory: Path, identity: dict[str, Any]) -> PreparationProgress:
    """Return the progress to continue from; without a note, the beginning.

    Raises:
        UserError: the note is damaged or of another identity, or shards are missing.
    """
    try:
        note = safe_json.read(directory / NOTE)
        is_ours = note["format"] == _FORMAT and _is_same(note, identity)
        progress = _progress_of(note)
    except FileNotFoundError:
        return PreparationProgress()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{directory / NOTE} is damaged: remove {directory} to start again, or give another --out DIR"
        ) from None
    if not is_ours:
        raise UserError(
            f"{directory} is an unfinished dataset of other text or options: remove it to start again, or give another"
            " --out DIR"
        )
    if "reader" not in note and _is_read_differently(identity):
        log.warning(f"{directory} was started by an earlier version, which reads text differently: starting again")
        (directory / NOTE).unlink()
        return PreparationProgress()
    _check_written(directory, progress)
    return progress


def _is_same(note: dict[str, Any], identity: dict[str, Any]) -> bool:
    if "reader" in note:
        return bool(note["identity"] == identity)
    source = [row[:3] for row in identity["source"]]  # earlier versions did not record how a part is read
    return bool(note["identity"] == {**identity, "source": source})


def _is_read_differently(identity: dict[str, Any]) -> bool:
    """Return whether an earlier version found other documents in some part."""
    readings = (reading for row in identity["source"] for reading in row[3:])
    return any(not reading.startswith("column ") for reading in readings)


def _progress_of(note: dict[str, Any]) -> PreparationProgress:
    """Parse a note.

    Raises:
        LookupError, TypeError, AttributeError: it is not valid.
    """
    # In the order of a new preparation, which determines the order of the shards in the index.
    splits = {split: Written.from_dict(note["splits"][split]) for split in PreparationProgress().splits}
    return PreparationProgress(
        Position(**note["place"]),
        note["pieces"],
        note["previous"],
        Counts(**note["counts"]),
        splits,
        note.get("separated") is True,
    )


def _check_written(directory: Path, progress: PreparationProgress) -> None:
    """Check the sizes of the shards.

    Raises:
        UserError: tokens recorded as written are missing.
    """
    for split, written in progress.splits.items():
        if not is_complete(directory, split, written):
            raise UserError(
                f"{directory} lacks tokens that {NOTE} records as written: remove it to start again, or give another"
                " --out DIR"
            )
