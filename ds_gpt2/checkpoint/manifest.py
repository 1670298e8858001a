"""``manifest.json``: the metadata of a checkpoint, and the size and SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import math
import stat
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ds_gpt2.checkpoint.naming import MANIFEST, is_plain_name
from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import MAX_LENGTH
from ds_gpt2.common.files import regular_only, sha256
from ds_gpt2.common.formatting import truncated
from ds_gpt2.common.safe_json import LARGEST
from ds_gpt2.common.terminal import one_line

Weights = Literal["raw", "ema"]  # of a checkpoint: those of the last update, or their moving average

FORMAT = 2
_MAX_BYTES = 64 * 2**20  # of a manifest; a typical manifest has about ten thousand


class DamagedError(Exception):
    """The checkpoint is damaged and must not be loaded. The message is the reason, in one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(truncated(str(reason), MAX_LENGTH)))


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_StrictModel):
    """The size in bytes and the SHA-256 of a file of a checkpoint, as written."""

    bytes: Annotated[int, Field(ge=0, le=LARGEST)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_StrictModel):
    """The content of ``manifest.json``. ``files`` does not list the manifest itself."""

    format: int = FORMAT
    kind: Literal["full", "weights"] = "full"  # "weights": only the fp32 weights; training cannot resume from it
    created: str  # ISO 8601, local time with offset
    epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # epochs of training data consumed
    state: dict[str, Any]  # TrainState
    roles: list[str] = []  # further tags of this checkpoint, such as epoch_00001
    world_size: Annotated[int, Field(gt=0, le=1_000_000)]
    identity: dict[str, Any]  # settings that a resumed run must share
    settings: dict[str, Any]  # the run's settings
    versions: dict[str, str]
    files: dict[str, FileEntry]

    @field_validator("state")
    @classmethod
    def _has_a_step(cls, state: dict[str, Any]) -> dict[str, Any]:
        if type(state.get("step")) is not int or state["step"] < 0:
            raise ValueError("has no step")
        return state

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not is_plain_name(name) or name == MANIFEST:
                raise ValueError(f"lists an invalid file name {name!r}")
        return files

    @property
    def step(self) -> int:
        """The number of completed training steps."""
        return int(self.state["step"])

    @property
    def bytes(self) -> int:
        """The total size of the files in bytes, without the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint contains the moving average of the weights: its run had ``ema.decay``."""
        return self.ema_decay is not None

    @property
    def ema_decay(self) -> float | None:
        """The decay of the moving average of the weights; None if the checkpoint has none."""
        section = self.settings.get("ema")
        decay = section.get("decay") if isinstance(section, dict) else None
        return decay if isinstance(decay, float) else None

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation at this step was completed, not interrupted by a stop."""
        return self.state.get("unevaluated") is None

    @property
    def made_at(self) -> float:
        """The creation time in seconds since 1970; 0 if ``created`` is invalid."""
        try:
            return datetime.fromisoformat(self.created).timestamp()
        except (ValueError, OverflowError, OSError):
            return 0.0

    @property
    def val_loss(self) -> float | None:
        """The validation loss at this step; None if it was not measured at this step."""
        loss = self.state.get("val_loss")
        measured_here = isinstance(loss, float) and math.isfinite(loss) and self.state.get("val_step") == self.step
        return loss if measured_here else None


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``. The encoding is canonical and contains its own SHA-256."""
    content = manifest.model_dump(mode="json")
    return _dump({**content, "sha256": _digest(content)})


def decode(data: bytes) -> Manifest:
    """Return the manifest that ``encode`` has encoded as ``data``.

    Raises:
        DamagedError: ``data`` is not an encoded manifest, is damaged, or has another format version.
    """
    try:
        content = safe_json.parse(data)
        digest = content.pop("sha256")
        is_intact = digest == _digest(content) and data == _dump({**content, "sha256": digest})
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # RecursionError: from _dump
        raise DamagedError(f"{MANIFEST} is damaged: it cannot be parsed") from None
    if not is_intact:
        raise DamagedError(f"{MANIFEST} is damaged: sha256 mismatch")
    if content.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} has format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedError(f"{MANIFEST} is invalid: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def read(checkpoint: Path) -> Manifest:
    """Return the manifest of the checkpoint in directory ``checkpoint``.

    Raises:
        DamagedError: the manifest is missing, unreadable or damaged.
    """
    path = checkpoint / MANIFEST
    try:
        with open(path, "rb", opener=regular_only) as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    return decode(data)


def problem_of(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
    """Return why file ``name`` of ``checkpoint`` differs from ``entry``; None if it is intact. Reads the whole file."""
    if (size_problem := size_problem_of(checkpoint, name, entry)) is not None:
        return size_problem
    try:
        digest = sha256(checkpoint / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if digest == entry.sha256 else f"{name} is damaged: sha256 mismatch"


def size_problem_of(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
    """Return why file ``name`` is missing or does not have the size in ``entry``; None if it has. Reads no content."""
    try:
        status = (checkpoint / name).stat()
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a regular file"
    size = status.st_size
    return None if size == entry.bytes else f"{name} has {size} bytes, {entry.bytes} were written"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
