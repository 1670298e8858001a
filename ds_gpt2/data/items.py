"""Tokenized items of evaluations with several possible endings: one item, and many of them in a few arrays."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ds_gpt2.common.files import replace_file
from ds_gpt2.data.shards import Tokens

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Item:
    """A tokenized question, with the lengths of its endings as text (without the space before them)."""

    context: Tokens
    endings: list[Tokens]
    label: int  # index of the correct ending
    characters: Counts  # (endings,)
    bytes: Counts  # (endings,), in UTF-8
    unscored: Counts | None = None  # (endings,) tokens at the start of each ending that are not scored; None: 0

    def first_scored(self, ending: int) -> int:
        """Return the index of the first scored token of an ending."""
        return 0 if self.unscored is None else int(self.unscored[ending])


class ItemList(Sequence[Item]):
    """Items in a few arrays, which take little more memory than the tokens; an item is created when it is read."""

    def __init__(self, items: Iterable[Item]) -> None:
        items = list(items)
        parts = [part for item in items for part in (item.context, *item.endings)]
        empty = np.zeros(0, np.int32)
        unscored = [np.zeros(len(item.endings), np.int32) if item.unscored is None else item.unscored for item in items]
        self._set(
            tokens=np.concatenate([np.zeros(0, np.uint16), *parts]),
            lengths=np.array([len(part) for part in parts], np.int32),
            endings=np.array([len(item.endings) for item in items], np.int32),
            labels=np.array([item.label for item in items], np.int32),
            characters=np.concatenate([empty, *(item.characters for item in items)]),
            bytes=np.concatenate([empty, *(item.bytes for item in items)]),
            unscored=np.concatenate([empty, *unscored]),
        )

    def _set(self, **arrays: npt.NDArray[Any]) -> None:
        """Set the arrays.

        Raises:
            ValueError, LookupError: an array is missing, or their lengths do not fit.
        """
        self._arrays = arrays
        parts_end = np.cumsum(arrays["lengths"], dtype=np.int64)
        self._starts = np.concatenate([[0], parts_end])  # of each part in ``tokens``
        self._first = np.concatenate([[0], np.cumsum(arrays["endings"], dtype=np.int64)])  # ending of each item
        count, endings = len(arrays["endings"]), int(self._first[-1])
        sizes = [len(arrays[name]) for name in ("labels", "characters", "bytes", "unscored", "lengths", "tokens")]
        if sizes != [count, endings, endings, endings, count + endings, int(self._starts[-1])]:
            raise ValueError("arrays of different items")

    def __len__(self) -> int:
        return len(self._arrays["endings"])

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = index % len(self)
        arrays, first, after = self._arrays, int(self._first[number]), int(self._first[number + 1])
        part = first + number  # every item before has one context
        starts = self._starts[part : part + after - first + 2]
        context, *endings = (arrays["tokens"][start:end] for start, end in itertools.pairwise(starts))
        own = slice(first, after)
        unscored = arrays["unscored"][own]
        return Item(
            context,
            endings,
            int(arrays["labels"][number]),
            arrays["characters"][own],
            arrays["bytes"][own],
            unscored if unscored.any() else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self._arrays.values()) + self._starts.nbytes + self._first.nbytes

    def sha256(self) -> str:
        """Return the sha256 of all arrays, in hexadecimal digits: of tokens, labels and lengths, not of a file."""
        digest = hashlib.sha256()
        for name in sorted(self._arrays):
            digest.update(f"{name} {len(self._arrays[name])} ".encode())
            digest.update(np.ascontiguousarray(self._arrays[name]).tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> bool:
        """Write the arrays to ``path``, atomically; return False if that is not possible."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **self._arrays)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.getvalue())
            return True
        return False

    @classmethod
    def read(cls, path: Path) -> ItemList | None:
        """Return the items of a file that ``write`` has written; None if it does not exist or is damaged."""
        items = cls(())
        try:
            with np.load(path, allow_pickle=False) as archive:
                items._set(**{name: archive[name] for name in archive.files})
        except Exception:  # a damaged zip archive can raise many types; the fix is the same
            return None
        return items
