"""A text that holds many documents, split where a separator stands between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ds_gpt2.data.prepare.documents import BLOCK_CHARACTERS, Document


@dataclass
class Separator:
    """A text that stands between documents, and whether it has occurred."""

    text: str
    found: bool = False

    def split(self, text: str) -> list[str]:
        """Split ``text`` wherever the separator occurs."""
        parts = text.split(self.text)
        self.found |= len(parts) > 1
        return parts


def split_all(documents: Iterable[Document], separator: Separator) -> Iterator[Document]:
    """Split every document; what is damaged or null stays as it is."""
    for document in documents:
        if isinstance(document, str):
            yield from separator.split(document)
        elif isinstance(document, Iterable):
            yield from split_blocks(document, separator)
        else:
            yield document


def split_blocks(blocks: Iterable[str], separator: Separator) -> Iterator[Document]:
    """Split a text that comes in blocks; a long document comes in blocks again."""
    blocks = iter(blocks)
    rest = ""
    for block in blocks:
        *whole, rest = separator.split(rest + block)
        yield from whole
        if len(rest) > BLOCK_CHARACTERS:
            long = _Long(rest, blocks, separator)
            yield long
            for _ in long:  # what was not read of it
                pass
            *whole, rest = separator.split(long.behind)
            yield from whole
    yield rest


class _Long:
    """One document up to its separator. It can be read once, in several turns."""

    def __init__(self, begin: str, blocks: Iterator[str], separator: Separator) -> None:
        self.behind = ""  # what has been read behind its separator
        self._blocks = self._read(begin, blocks, separator)

    def __iter__(self) -> Iterator[str]:
        return self._blocks

    def _read(self, begin: str, blocks: Iterator[str], separator: Separator) -> Iterator[str]:
        held = begin  # a separator may begin in its last characters
        for block in blocks:
            text, found, behind = (held + block).partition(separator.text)
            if found:
                separator.found = True
                self.behind = behind
                yield text
                return
            keep = len(text) - len(separator.text) + 1
            yield text[:keep]
            held = text[keep:]
        yield held
