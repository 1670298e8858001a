"""Write shards that can be truncated to any earlier length, and get their final names only when they are full."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ds_gpt2.common.files import open_for_writing, sha256
from ds_gpt2.data.dataset import Shard, Split
from ds_gpt2.data.shards import HEADER_BYTES, TOKEN_BYTES, Tokens, header_of

_UNFINISHED = ".unfinished"


@dataclass
class Written:
    """The written part of a split."""

    shards: list[Shard] = field(default_factory=list)  # full shards
    tokens: int = 0  # in the unfinished shard
    full: int = field(init=False)  # tokens of the full shards

    def __post_init__(self) -> None:
        self.full = sum(shard.tokens for shard in self.shards)

    @property
    def total(self) -> int:
        """Tokens of the full shards and the unfinished one."""
        return self.full + self.tokens

    def finish(self, shard: Shard) -> None:
        """Record that the unfinished shard has become ``shard``."""
        self.shards.append(shard)
        self.full += shard.tokens
        self.tokens = 0

    def to_dict(self) -> dict[str, Any]:
        return {"shards": [asdict(shard) for shard in self.shards], "tokens": self.tokens}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Written:
        return Written([Shard(**shard) for shard in content["shards"]], int(content["tokens"]))


def is_complete(directory: Path, split: Split, written: Written) -> bool:
    """Return whether all tokens in ``written`` are present in ``directory``, by the sizes of the files."""
    sizes = {shard.file: shard.bytes for shard in written.shards}
    if any(_size(directory / file) != size for file, size in sizes.items()):
        return False
    path = _path(directory, split, len(written.shards))
    longest = max(_size(path), _size(_unfinished(path)))
    return not written.tokens or longest >= HEADER_BYTES + TOKEN_BYTES * written.tokens


class SplitWriter:
    """Writes the numbered shards of one split."""

    def __init__(self, directory: Path, split: Split, shard_tokens: int, written: Written) -> None:
        """
        Args:
            shard_tokens: tokens of a full shard.
            written: what to retain of the files in ``directory``; updated by ``write``. The rest is overwritten.
        """
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self.written = written
        self._file: BinaryIO | None = None
        if written.tokens:
            self._continue_shard()

    def write(self, tokens: Tokens) -> None:
        """Append ``tokens``, (n,) uint16, starting new shards as needed."""
        while len(tokens):
            if self._file is None:
                self._file = open_for_writing(self._unfinished, "wb")
                self._file.write(bytes(HEADER_BYTES))
            missing = self._shard_tokens - self.written.tokens
            self._file.write(tokens[:missing].astype("<u2").tobytes())
            self.written.tokens += len(tokens[:missing])
            tokens = tokens[missing:]
            if self.written.tokens == self._shard_tokens:
                self._finish()

    def sync(self) -> None:
        """Flush everything written to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> list[Shard]:
        """Finish the last shard and return all shards."""
        if self._file is not None:
            self._finish()
        return self.written.shards

    def abandon(self) -> None:
        """Close the unfinished shard without finishing it."""
        if self._file is not None:
            self._file.close()

    @property
    def _path(self) -> Path:
        return _path(self._directory, self._split, len(self.written.shards))

    @property
    def _unfinished(self) -> Path:
        return _unfinished(self._path)

    def _continue_shard(self) -> None:
        """Open the unfinished shard and discard what was written after the last record of progress."""
        if not self._unfinished.exists():
            self._path.rename(self._unfinished)  # it was finished after the last record of progress
        self._file = self._unfinished.open("r+b")
        self._file.truncate(HEADER_BYTES + TOKEN_BYTES * self.written.tokens)
        self._file.seek(0, os.SEEK_END)

    def _finish(self) -> None:
        assert self._file is not None
        tokens, path = self.written.tokens, self._path
        self._file.seek(0)
        self._file.write(header_of(tokens))
        self.sync()
        self._file.close()
        self._file = None
        digest = sha256(self._unfinished)
        self._unfinished.rename(path)
        self.written.finish(Shard(path.name, self._split, tokens, path.stat().st_size, digest))


def _path(directory: Path, split: Split, number: int) -> Path:
    return directory / f"{split}_{number:06d}.bin"


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + _UNFINISHED)


def _size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if it does not exist."""
    return path.stat().st_size if path.exists() else -1
