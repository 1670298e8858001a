"""What a power cut may leave: a recorder of file operations, and a model of a disk that keeps what it was told to sync.

The model is harsher than any real file system: a name that was not synced may be there or not, whatever became of its
neighbours; a file that was not synced may have any content. A rename is one step: no state has half of it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar, Union

from ds_gpt2.checkpoint.filesystem import Disk

Kind = Literal[
    "create", "write", "sync", "make_directory", "sync_directory", "rename", "link", "unlink", "remove_directory"
]
Tree = tuple[tuple[str, Union[bytes, "Tree"]], ...]  # sorted by name, so that equal states are equal
Step = tuple[str, int]  # the site and line of a call of the disk
T = TypeVar("T")

_PROTOCOL = ("ds_gpt2.checkpoint.commit", "ds_gpt2.checkpoint.filesystem", "ds_gpt2.checkpoint.weights")


@dataclass(frozen=True)
class Operation:
    """One thing done to the files below a root; paths are relative to it."""

    kind: Kind
    path: str
    target: str = ""  # of rename and link
    data: bytes = b""  # of write
    site: str = ""  # the functions of the protocol that asked for it, outermost first
    line: int = 0  # in the last of them

    @property
    def step(self) -> Step:
        return self.site, self.line


class KilledError(BaseException):
    """The process ends here; nothing of the protocol may handle it."""


class RecordingDisk(Disk):
    """Does everything for real but the syncing, which a test need not wait for, and writes it down."""

    def __init__(self, root: Path, links: bool = True) -> None:
        """
        Args:
            links: whether the file system has hard links.
        """
        self.operations: list[Operation] = []
        self.dies_at: int | None = None  # the number of the operation that is not reached any more
        self.skipped: Step | None = None  # is neither done nor recorded: the protocol without this line
        self._root = root
        self._links = links

    def create(self, path: Path) -> BinaryIO:
        file = self._perform("create", partial(super().create, path), path)
        assert file is not None, "a mutant without files is none"
        return file

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        self._perform("write", partial(super().write, file, data), Path(file.name), data=bytes(data))

    def sync(self, file: BinaryIO) -> None:
        self._perform("sync", lambda: None, Path(file.name))

    def make_directory(self, path: Path) -> None:
        if not path.is_dir():
            self._perform("make_directory", partial(super().make_directory, path), path)

    def sync_directory(self, path: Path) -> None:
        self._perform("sync_directory", partial(os.listdir, path), path)  # which fails where a sync would

    def rename(self, source: Path, target: Path) -> None:
        self._perform("rename", partial(super().rename, source, target), source, target)

    def link(self, source: Path, target: Path) -> None:
        if not self._links:
            raise PermissionError(1, "Operation not permitted")
        self._perform("link", partial(super().link, source, target), source, target)

    def unlink(self, path: Path) -> None:
        self._perform("unlink", partial(super().unlink, path), path)

    def remove_directory(self, path: Path) -> None:
        self._perform("remove_directory", partial(super().remove_directory, path), path)

    def _perform(
        self, kind: Kind, action: Callable[[], T], path: Path, target: Path | None = None, data: bytes = b""
    ) -> T | None:
        if self.dies_at is not None and len(self.operations) >= self.dies_at:
            raise KilledError
        functions, line = _asked_by()
        operation = Operation(
            kind, self._name(path), self._name(target) if target else "", data, f"{functions}: {kind}", line
        )
        if operation.step == self.skipped:
            return None
        result = action()
        self.operations.append(operation)
        return result

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _asked_by() -> tuple[str, int]:
    """The functions of the protocol that are being called, and the line of the last."""
    names: list[str] = []
    line = 0
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if frame.f_globals["__name__"] in _PROTOCOL and not code.co_name.startswith("<"):
            line = line or frame.f_lineno
            names.insert(0, code.co_name)
        frame = frame.f_back
    return " > ".join(names), line


Choose = Callable[[int], int]  # of so many possibilities, the number of one; 0 is: as if there had been no power cut


@dataclass(eq=False)
class _File:
    content: bytes = b""
    synced: bytes = b""
    dirty: bool = False

    def possible(self) -> list[bytes]:
        """From all of it to what was last synced."""
        whole = self.content
        if not self.dirty:
            return [whole]
        part, zeros, garbage = whole[: len(whole) // 2], bytes(len(whole)), bytes(255 - byte for byte in whole)
        return list(dict.fromkeys((whole, part, zeros, garbage, b"", self.synced)))


@dataclass(frozen=True)
class _Change:
    """Of the names in a directory: one taken away, one given, or both at once."""

    taken: str | None
    given: str | None
    node: _File | _Directory | None

    def apply(self, names: dict[str, _File | _Directory]) -> None:
        if self.taken is not None:
            names.pop(self.taken, None)
        if isinstance(self.node, _Directory):  # has one name only, also where a rename in between is lost
            for name in [name for name, node in names.items() if node is self.node]:
                del names[name]
        if self.given is not None and self.node is not None:
            names[self.given] = self.node


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    synced: dict[str, _File | _Directory] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)

    def change(self, taken: str | None, given: str | None, node: _File | _Directory | None) -> None:
        change = _Change(taken, given, node)
        change.apply(self.names)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []


class Volume:
    """A disk and the memory in front of it."""

    def __init__(self) -> None:
        self._root = _Directory()

    def apply(self, operation: Operation) -> None:
        """Do it as a running system sees it; on the medium is what a sync has put there."""
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
                self._name_again(operation, directory, name)
            case "unlink" | "remove_directory":
                if name in directory.names:
                    directory.change(name, None, None)

    def settle(self) -> None:
        """Everything is on the medium."""
        _settle(self._root)

    def after_power_cut(self, choose: Choose) -> Tree:
        """What is found there, chance being ``choose``."""
        contents: dict[int, bytes] = {}  # a file of two names has one content
        return _remains_of_directory(self._root, choose, contents)

    def _create(self, directory: _Directory, name: str) -> None:
        if name in directory.names:  # the same file, emptied
            file = self._file(directory, name)
            file.content, file.dirty = b"", True
        else:
            directory.change(None, name, _File())

    def _name_again(self, operation: Operation, directory: _Directory, name: str) -> None:
        other, new_name = self._locate(operation.target)
        if operation.kind == "link":
            other.change(None, new_name, directory.names[name])
        else:
            assert other is directory, "a rename to another directory has two names to sync: not modelled"
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


def _remains_of_directory(directory: _Directory, choose: Choose, contents: dict[int, bytes]) -> Tree:
    names = dict(directory.synced)
    for change in directory.pending:
        if choose(2) == 0:
            change.apply(names)
    return tuple((name, _remains(names[name], choose, contents)) for name in sorted(names))


def _remains(node: _File | _Directory, choose: Choose, contents: dict[int, bytes]) -> bytes | Tree:
    if isinstance(node, _Directory):
        return _remains_of_directory(node, choose, contents)
    if id(node) not in contents:
        possible = node.possible()
        contents[id(node)] = possible[choose(len(possible)) if len(possible) > 1 else 0]
    return contents[id(node)]


def crash_states(
    operations: Sequence[Operation], first: int = 0, settled: int = 0, most: int = 200, seed: int = 0
) -> Iterator[tuple[int, Tree]]:
    """(how many operations were done, what is left), for a power cut after each number of operations.

    Args:
        first: the smallest number of operations.
        settled: all effects of so many are on the medium.
        most: states for one number of operations: all there are, or a random sample with the extremes.
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
    found: dict[Tree, None] = {}
    for count, tree in enumerate(_all(volume)):
        found[tree] = None
        if count >= 4 * most:
            return _sample(volume, most, chance)
    return list(found) if len(found) <= most else _sample(volume, most, chance)


def _all(volume: Volume) -> Iterator[Tree]:
    """Every possibility: each time the last choice that has another possibility takes it."""
    picks: list[int] = []
    while True:
        sizes: list[int] = []
        yield volume.after_power_cut(partial(_next_pick, picks, sizes))
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
    """All kept, all lost, each thing alone lost or kept, in every way; and chance for the rest."""
    sizes: list[int] = []
    whole = volume.after_power_cut(partial(_next_pick, [], sizes))
    found = {whole: None, volume.after_power_cut(lambda size: size - 1): None}
    for odd, size in enumerate(sizes):
        found[volume.after_power_cut(_lost_but(odd))] = None
        for way in range(1, size):
            found[volume.after_power_cut(_kept_but(odd, way))] = None
    for _ in range(2 * most):
        if len(found) >= most:
            break
        found[volume.after_power_cut(chance.randrange)] = None
    return list(found)


def _kept_but(odd: int, way: int) -> Choose:
    asked = itertools.count()
    return lambda size: min(way, size - 1) if next(asked) == odd else 0


def _lost_but(odd: int) -> Choose:
    asked = itertools.count()
    return lambda size: 0 if next(asked) == odd else size - 1


def materialise(tree: Tree, folder: Path) -> None:
    """Make ``folder`` look like ``tree``. What does already is left as it is: states differ little, and time counts."""
    folder.mkdir(exist_ok=True)
    wanted, there = dict(tree), {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    for name, is_directory in there.items():
        if name not in wanted or is_directory == isinstance(wanted[name], bytes):
            _remove(folder / name, is_directory)
    for name, content in tree:
        if isinstance(content, bytes):
            _put(folder / name, content, there.get(name) is False)
        else:
            materialise(content, folder / name)


def _put(path: Path, content: bytes, there: bool) -> None:
    if there and path.read_bytes() != content:
        path.unlink()  # it may have another name
        there = False
    if not there:
        path.write_bytes(content)


def _remove(path: Path, is_directory: bool) -> None:
    if is_directory:
        shutil.rmtree(path)
    else:
        path.unlink()
