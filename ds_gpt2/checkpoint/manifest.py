"""``manifest.json``: what a checkpoint is, and the size and sha256 of every file in it."""

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
from ds_gpt2.common.errors import shortened
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.safe_json import LARGEST
from ds_gpt2.common.terminal import one_line

FORMAT = 2
_LARGEST = 64 * 2**20  # bytes of a manifest; a real one has some ten thousand


class DamagedError(Exception):
    """A checkpoint that must not be loaded; the message is the reason, one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(shortened(str(reason))))


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Plain):
    """One file of a checkpoint, as it was written."""

    bytes: Annotated[int, Field(ge=0, le=LARGEST)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Plain):
    """The commit marker. ``files`` does not list the manifest itself."""

    format: int = FORMAT
    kind: Literal["full", "weights"] = "full"  # "weights": fp32 weights alone, cannot be resumed from
    created: str  # ISO 8601, local time with offset
    epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # epochs of training data seen
    state: dict[str, Any]  # TrainState
    roles: list[str] = []  # other tags under which it is to be known
    world_size: Annotated[int, Field(gt=0, le=1_000_000)]
    identity: dict[str, Any]  # what a resumed run must share
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
                raise ValueError(f"names a file {name!r}")
        return files

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation of its step was complete: no stop broke it off."""
        return self.state.get("unevaluated") is None

    @property
    def made_at(self) -> float:
        """When the checkpoint was made, in seconds since 1970; 0 if that cannot be read."""
        try:
            return datetime.fromisoformat(self.created).timestamp()
        except (ValueError, OverflowError, OSError):
            return 0.0

    @property
    def val_loss(self) -> float | None:
        """The validation loss of this very step, if it was measured."""
        loss = self.state.get("val_loss")
        measured_here = isinstance(loss, float) and math.isfinite(loss) and self.state.get("val_step") == self.step
        return loss if measured_here else None


def encode(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``: one form per content, with a sha256 of its own."""
    content = manifest.model_dump(mode="json")
    return _dump({**content, "sha256": _digest(content)})


def decode(data: bytes) -> Manifest:
    """The inverse of ``encode``.

    Raises:
        DamagedError: not the bytes that ``encode`` wrote, or another version's.
    """
    try:
        content = safe_json.parse(data)
        digest = content.pop("sha256")
        whole = digest == _digest(content) and data == _dump({**content, "sha256": digest})
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # RecursionError: dumped again
        raise DamagedError(f"{MANIFEST} is damaged: not what was written") from None
    if not whole:
        raise DamagedError(f"{MANIFEST} is damaged: its sha256 does not fit")
    if content.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} has format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedError(f"{MANIFEST} is not valid: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def read(checkpoint: Path) -> Manifest:
    """The manifest of the checkpoint in directory ``checkpoint``.

    Raises:
        DamagedError: missing, unreadable or damaged.
    """
    path = checkpoint / MANIFEST
    try:
        with open(path, "rb", opener=regular_only) as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    return decode(data)


def problem_of(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
    """Why file ``name`` is not the one that was written; None if it is. Reads all of it."""
    path = checkpoint / name
    if (wrong_size := size_problem_of(checkpoint, name, entry)) is not None:
        return wrong_size
    digest = hashlib.sha256()
    try:
        with open(path, "rb", opener=regular_only) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == entry.sha256 else f"{name} is damaged: its sha256 is not the one written"


def size_problem_of(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
    """The part of ``problem_of`` that reads nothing."""
    try:
        status = (checkpoint / name).stat()
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is no regular file"
    size = status.st_size
    return None if size == entry.bytes else f"{name} has {size} bytes, {entry.bytes} were written"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
