"""The progress of a preparation, and the file from which the same command continues after an interruption."""

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
from ds_gpt2.data.prepare.output import PROGRESS_FILE
from ds_gpt2.data.prepare.shard_writer import Written, is_complete
from ds_gpt2.data.prepare.sources import Source

log = logging.getLogger(__name__)

_FORMAT = 2
_READER = 2  # version of the text readers; the progress files of earlier versions lack it


@dataclass
class PreparationProgress:
    """The progress of a preparation. Tokens that were written later are discarded when the preparation continues."""

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


def write_progress(directory: Path, identity: dict[str, Any], progress: PreparationProgress) -> None:
    """Write ``progress`` durably. The shards must have been synced before."""
    content = {
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
    replace_file(directory / PROGRESS_FILE, json.dumps(content), durable=True)


def read_progress(directory: Path, identity: dict[str, Any]) -> PreparationProgress:
    """Return the progress to continue from; without a progress file, the beginning.

    Raises:
        UserError: the progress file is damaged or of another identity, or shards are missing.
    """
    try:
        content = safe_json.read(directory / PROGRESS_FILE)
        is_ours = content["format"] == _FORMAT and _is_same(content, identity)
        progress = _progress_of(content)
    except FileNotFoundError:
        return PreparationProgress()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{directory / PROGRESS_FILE} is damaged: remove {directory} to start again, or give another --out DIR"
        ) from None
    if not is_ours:
        raise UserError(
            f"{directory} is an unfinished dataset of other text or options: remove it to start again, or give another"
            " --out DIR"
        )
    if "reader" not in content and _is_read_differently(identity):
        log.warning(f"{directory} was started by an earlier version, which reads text differently: starting again")
        (directory / PROGRESS_FILE).unlink()
        return PreparationProgress()
    _check_written(directory, progress)
    return progress


def _is_same(content: dict[str, Any], identity: dict[str, Any]) -> bool:
    if "reader" in content:
        return bool(content["identity"] == identity)
    source = [row[:3] for row in identity["source"]]  # earlier versions did not record how a part is read
    return bool(content["identity"] == {**identity, "source": source})


def _is_read_differently(identity: dict[str, Any]) -> bool:
    """Return whether an earlier version found other documents in some part."""
    readings = (reading for row in identity["source"] for reading in row[3:])
    return any(not reading.startswith("column ") for reading in readings)


def _progress_of(content: dict[str, Any]) -> PreparationProgress:
    """Parse the content of a progress file.

    Raises:
        LookupError, TypeError, AttributeError: it is not valid.
    """
    # In the order of a new preparation, which determines the order of the shards in the index.
    splits = {split: Written.from_dict(content["splits"][split]) for split in PreparationProgress().splits}
    return PreparationProgress(
        Position(**content["place"]),
        content["pieces"],
        content["previous"],
        Counts(**content["counts"]),
        splits,
        content.get("separated") is True,
    )


def _check_written(directory: Path, progress: PreparationProgress) -> None:
    """Check the sizes of the shards.

    Raises:
        UserError: tokens recorded as written are missing.
    """
    for split, written in progress.splits.items():
        if not is_complete(directory, split, written):
            raise UserError(
                f"{directory} lacks tokens that {PROGRESS_FILE} records as written: remove it to start again, or give"
                " another --out DIR"
            )
