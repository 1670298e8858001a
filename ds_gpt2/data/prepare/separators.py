"""Split texts into documents at a separator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ds_gpt2.data.prepare.documents import BLOCK_CHARACTERS, Document


@dataclass
class Separator:
    """A text between documents, and whether it has occurred."""

    text: str
    found: bool = False

    def split(self, text: str) -> list[str]:
        """Split ``text`` wherever the separator occurs."""
        parts = text.split(self.text)
        self.found |= len(parts) > 1
        return parts


def split_all(documents: Iterable[Document], separator: Separator) -> Iterator[Document]:
    """Split every document; damaged documents and null are unchanged."""
    for document in documents:
        if isinstance(document, str):
            yield from separator.split(document)
        elif isinstance(document, Iterable):
            yield from split_blocks(document, separator)
        else:
            yield document


def split_blocks(blocks: Iterable[str], separator: Separator) -> Iterator[Document]:
    """Split a text given in blocks; long documents are yielded in blocks."""
    blocks = iter(blocks)
    rest = ""
    for block in blocks:
        *whole, rest = separator.split(rest + block)
        yield from whole
        if len(rest) > BLOCK_CHARACTERS:
            long = _Long(rest, blocks, separator)
            yield long
            for _ in long:  # skip what the caller did not read
                pass
            *whole, rest = separator.split(long.following)
            yield from whole
    yield rest


class _Long:
    """The blocks of one document up to its separator; an iterator that can be read once."""

    def __init__(self, first: str, blocks: Iterator[str], separator: Separator) -> None:
        self.following = ""  # text read after the separator
        self._blocks = self._read(first, blocks, separator)

    def __iter__(self) -> Iterator[str]:
        return self._blocks

    def _read(self, first: str, blocks: Iterator[str], separator: Separator) -> Iterator[str]:
        buffer = first  # a separator may start in its last characters
        for block in blocks:
            text, found, following = (buffer + block).partition(separator.text)
            if found:
                separator.found = True
                self.following = following
                yield text
                return
            safe = len(text) - len(separator.text) + 1
            yield text[:safe]
            buffer = text[safe:]
        yield buffer
