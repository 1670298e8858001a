"""The states that a power failure may leave: a model of a disk on which only synced data is certain to survive.

The model is stricter than any real file system. A name that was not synced may exist or not, independently of others; a
file that was not synced may have any content. A rename is atomic.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Union

from disks import Operation

Tree = tuple[tuple[str, Union[bytes, "Tree"]], ...]  # sorted by name, so that equal states are equal

Choose = Callable[[int], int]  # chooses one of so many possibilities; 0 means: as without a power failure


@dataclass(eq=False)
class _File:
    content: bytes = b""
    synced: bytes = b""
    dirty: bool = False

    def possible(self) -> list[bytes]:
        """Return the possible contents after a power failure, from the complete to the last synced content."""
        return _possible_contents(self.content, self.synced) if self.dirty else [self.content]


@functools.cache
def _possible_contents(whole: bytes, synced: bytes) -> list[bytes]:
    part, zeros, garbage = whole[: len(whole) // 2], bytes(len(whole)), bytes(255 - byte for byte in whole)
    return list(dict.fromkeys((whole, part, zeros, garbage, b"", synced)))


@dataclass(frozen=True)
class _Change:
    """A change of the names in a directory: one is removed, one is added, or both at the same time."""

    removed: str | None
    added: str | None
    node: _File | _Directory | None

    def apply(self, names: dict[str, _File | _Directory]) -> None:
        if self.removed is not None:
            names.pop(self.removed, None)
        if isinstance(self.node, _Directory):  # has only one name, even if a rename is lost
            for name in [name for name, node in names.items() if node is self.node]:
                del names[name]
        if self.added is not None and self.node is not None:
            names[self.added] = self.node


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    synced: dict[str, _File | _Directory] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)

    def change(self, removed: str | None, added: str | None, node: _File | _Directory | None) -> None:
        change = _Change(removed, added, node)
        change.apply(self.names)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []


class Volume:
    """A disk and its write cache."""

    def __init__(self) -> None:
        self._root = _Directory()

    def apply(self, operation: Operation) -> None:
        """Apply the operation as a running system sees it. Only syncs make it durable."""
        directory, name = self._locate(operation.path)
        match operation.kind:
            case "create":
                self._create(directory, name)
            case "write":
                file = self._file(directory, name)
                file.content, file.dirty = file.content + operation.data, True
            case "sync":
                file = self._file(directory, name)
                file.synced, file.dirty = file.content, False
            case "make_directory":
                directory.change(None, name, _Directory())
            case "sync_directory":
                self._directory(operation.path).sync()
            case "rename" | "link":
                self._link_or_rename(operation, directory, name)
            case "unlink" | "remove_directory":
                if name in directory.names:
                    directory.change(name, None, None)

    def settle(self) -> None:
        """Make everything durable."""
        _settle(self._root)

    def after_power_failure(self, choose: Choose) -> Tree:
        """Return the files after a power failure; ``choose`` selects one of the possibilities at each uncertainty."""
        contents: dict[int, bytes] = {}  # a file with two names has one content
        return _surviving_directory(self._root, choose, contents)

    def _create(self, directory: _Directory, name: str) -> None:
        if name in directory.names:  # the same file, emptied
            file = self._file(directory, name)
            file.content, file.dirty = b"", True
        else:
            directory.change(None, name, _File())

    def _link_or_rename(self, operation: Operation, directory: _Directory, name: str) -> None:
        other, new_name = self._locate(operation.target)
        if operation.kind == "link":
            other.change(None, new_name, directory.names[name])
        else:
            assert other is directory, "a rename to another directory is not modeled"
            directory.change(name, new_name, directory.names[name])

    def _locate(self, path: str) -> tuple[_Directory, str]:
        parent, _, name = path.rpartition("/")
        return self._directory(parent), name

    def _directory(self, path: str) -> _Directory:
        found = self._root
        for part in path.split("/") if path not in ("", ".") else []:
            node = found.names[part]
            assert isinstance(node, _Directory)
            found = node
        return found

    def _file(self, directory: _Directory, name: str) -> _File:
        node = directory.names[name]
        assert isinstance(node, _File)
        return node


def _settle(node: _File | _Directory) -> None:
    if isinstance(node, _File):
        node.synced, node.dirty = node.content, False
        return
    node.sync()
    for child in node.names.values():
        _settle(child)


def _surviving_directory(directory: _Directory, choose: Choose, contents: dict[int, bytes]) -> Tree:
    names = dict(directory.synced)
    for change in directory.pending:
        if choose(2) == 0:
            change.apply(names)
    return tuple((name, _surviving(names[name], choose, contents)) for name in sorted(names))


def _surviving(node: _File | _Directory, choose: Choose, contents: dict[int, bytes]) -> bytes | Tree:
    if isinstance(node, _Directory):
        return _surviving_directory(node, choose, contents)
    if id(node) not in contents:
        possible = node.possible()
        contents[id(node)] = possible[choose(len(possible)) if len(possible) > 1 else 0]
    return contents[id(node)]


def crash_states(
    operations: Sequence[Operation], first: int = 0, settled: int = 0, most: int = 200, seed: int = 0
) -> Iterator[tuple[int, Tree]]:
    """Yield (number of operations, state) for power failures after each number of operations.

    Args:
        first: the smallest number of operations.
        settled: the effects of so many operations are durable.
        most: the limit of states per number of operations. If there are more, a random sample is used.
    """
    volume = Volume()
    chance = random.Random(seed)
    for number in range(len(operations) + 1):
        if number == settled:
            volume.settle()
        if number >= max(first, settled):
            yield from ((number, tree) for tree in _outcomes(volume, most, chance))
        if number < len(operations):
            volume.apply(operations[number])


def _outcomes(volume: Volume, most: int, chance: random.Random) -> list[Tree]:
    states: dict[Tree, None] = {}
    for count, tree in enumerate(_all(volume)):
        states[tree] = None
        if count >= 4 * most:
            return _sample(volume, most, chance)
    return list(states) if len(states) <= most else _sample(volume, most, chance)


def _all(volume: Volume) -> Iterator[Tree]:
    """Yield the states of all combinations of choices."""
    picks: list[int] = []
    while True:
        sizes: list[int] = []
        yield volume.after_power_failure(partial(_next_pick, picks, sizes))
        while picks and picks[-1] == sizes[len(picks) - 1] - 1:
            picks.pop()
        if not picks:
            return
        picks[-1] += 1


def _next_pick(picks: list[int], sizes: list[int], size: int) -> int:
    sizes.append(size)
    if len(sizes) > len(picks):
        picks.append(0)
    return picks[len(sizes) - 1]


def _sample(volume: Volume, most: int, chance: random.Random) -> list[Tree]:
    """Return a sample: all changes survive, none survives, all but one, only one, and random combinations."""
    sizes: list[int] = []
    whole = volume.after_power_failure(partial(_next_pick, [], sizes))
    found = {whole: None, volume.after_power_failure(lambda size: size - 1): None}
    for odd, size in enumerate(sizes):
        found[volume.after_power_failure(_lost_but(odd))] = None
        for choice in range(1, size):
            found[volume.after_power_failure(_survives_but(odd, choice))] = None
    for _ in range(2 * most):
        if len(found) >= most:
            break
        found[volume.after_power_failure(chance.randrange)] = None
    return list(found)


def _survives_but(odd: int, choice: int) -> Choose:
    counter = itertools.count()
    return lambda size: min(choice, size - 1) if next(counter) == odd else 0


def _lost_but(odd: int) -> Choose:
    counter = itertools.count()
    return lambda size: 0 if next(counter) == odd else size - 1


def materialize(tree: Tree, folder: Path) -> None:
    """Write ``tree`` to ``folder``. Only differences are written: consecutive states differ little."""
    folder.mkdir(exist_ok=True)
    expected, existing = dict(tree), {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    for name, is_directory in existing.items():
        if name not in expected or is_directory == isinstance(expected[name], bytes):
            _remove(folder / name, is_directory)
    for name, content in tree:
        if isinstance(content, bytes):
            _put(folder / name, content, existing.get(name) is False)
        else:
            materialize(content, folder / name)


def _put(path: Path, content: bytes, exists: bool) -> None:
    if exists and path.read_bytes() != content:
        path.unlink()  # it may be hard-linked
        exists = False
    if not exists:
        path.write_bytes(content)


def _remove(path: Path, is_directory: bool) -> None:
    if is_directory:
        shutil.rmtree(path)
    else:
        path.unlink()
