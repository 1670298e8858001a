"""Cut documents into pieces at token boundaries, so that a long document is tokenized by several workers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from ds_gpt2.data.prepare.decoding import count_control_characters
from ds_gpt2.data.prepare.documents import Document, Unreadable
from ds_gpt2.data.prepare.sources import Source
from ds_gpt2.data.tokenizer import END_OF_TEXT_MARK

log = logging.getLogger(__name__)

PIECE_CHARACTERS = 16_384
SEPARATOR = END_OF_TEXT_MARK  # written between documents by other programs

# Patterns that begin with the character itself match thirty times as fast as patterns that begin with a look-behind.
_LINE = re.compile(r"\n(?<=\S\n)(?=\S)")
_WORD = re.compile(r" (?<=\S )(?=\S)")
_ALWAYS_RECORDED = ("documents", "empty", "null")
_MOST_LOGGED = 20  # damaged documents; further ones are only counted
_LONGEST_LINE = 16  # in pieces; longer lines are cut between words

Item = TypeVar("Item")


@dataclass(frozen=True, order=True)
class Position:
    """The position of a piece in a source, from which reading can continue."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of one document, or a whole document that is not long."""

    text: str
    starts_document: bool
    next_position: Position  # of the next piece
    start: int = 0  # characters of the document before this piece


@dataclass
class Counts:
    """Counts of the documents of a source, and of unusual characters in them."""

    documents: int = 0  # neither empty, null nor unreadable
    empty: int = 0  # only white space
    null: int = 0
    unreadable: int = 0  # damaged
    endoftext: int = 0  # occurrences of SEPARATOR in the text, where it is read as ordinary characters
    replacement: int = 0  # characters U+FFFD: invalid bytes, or part of the text itself
    control: int = 0  # control characters that are not used in text, such as NUL

    def to_dict(self) -> dict[str, int]:
        """Return the counts to record: always the first three, the others if they are not 0."""
        return {name: count for name, count in asdict(self).items() if count or name in _ALWAYS_RECORDED}

    def accumulate(self, other: Counts) -> None:
        """Add the counts of ``other``."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def add(self, document: Document) -> bool:
        """Count a document; return whether it has text to tokenize."""
        if document is None:
            self.null += 1
        elif isinstance(document, Unreadable):
            self.unreadable += 1
        elif isinstance(document, str) and not document.strip():
            self.empty += 1
        else:
            self.documents += 1
            return True
        return False


def pieces_of(source: Source, start: Position) -> Iterator[tuple[Piece, Counts]]:
    """Yield all pieces from ``start`` on, each with the counts since the previous piece.

    The last one is an empty piece with the counts after the last document. The first damaged documents are logged, and
    the first <|endoftext|>, U+FFFD and control character in the text.

    Raises:
        UserError: a part cannot be read, or has another format or encoding.
    """
    counts, position, damaged, warned = Counts(), start, 0, False
    unusual = _UnusualCharacters()
    for number in range(start.part, len(source.parts)):
        if number + 1 < len(source.parts):
            source.parts[number + 1].prefetch()
        for index, document in enumerate(source.parts[number].documents(position.document), start=position.document):
            is_continued = position.piece > 0  # counted when its first piece was yielded
            if not is_continued and not counts.add(document):
                if isinstance(document, Unreadable):
                    damaged += 1
                    _warn_of_damage(document, damaged)
                continue
            assert document is not None and not isinstance(document, Unreadable)
            for piece in _pieces_of_document(document, Position(number, index, position.piece)):
                unusual.count(piece, counts, source.parts[number].name, index)
                counts.endoftext += piece.text.count(SEPARATOR)
                if counts.endoftext and not warned:
                    warned = True
                    log.warning(
                        f"{source.parts[number].name} has {SEPARATOR} in its text, read as ordinary characters; if it"
                        f" separates documents, start again with --separator '{SEPARATOR}'"
                    )
                yield piece, counts
                counts = Counts()
            position = Position(number, index + 1)
        position = Position(number + 1)
    yield Piece("", False, position), counts


class _UnusualCharacters:
    """Counts characters that are not used in text, and warns of the first one of each kind."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def count(self, piece: Piece, counts: Counts, part: str, document: int) -> None:
        replacement, control = piece.text.count("\ufffd"), count_control_characters(piece.text)
        counts.replacement += replacement
        counts.control += control
        where = f"{part}, document {document + 1}, character"
        if replacement and self._is_first("replacement"):
            index = piece.text.index("\ufffd")
            log.warning(
                f"{where} {piece.start + index + 1:,}: U+FFFD in the text (it replaces invalid bytes); further ones are"
                " only counted. If the file has another encoding, give --encoding"
            )
        if control and self._is_first("control"):
            index = next(index for index, each in enumerate(piece.text) if count_control_characters(each))
            log.warning(
                f"{where} {piece.start + index + 1:,}: control character U+{ord(piece.text[index]):04X} in the text;"
                " further ones are only counted"
            )

    def _is_first(self, kind: str) -> bool:
        is_first = kind not in self._warned
        self._warned.add(kind)
        return is_first


def cut(document: str | Iterable[str], characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long document before newlines between two printing characters; very long lines before a space.

    GPT-2's pre-tokenizer splits the text there, so the tokens of the pieces are those of the whole document. A
    document in blocks gives the same pieces, and only the current piece is in memory.

    Args:
        characters: shortest length of a piece, except the last.
    """
    rest = ""
    for block in [document] if isinstance(document, str) else document:
        *pieces, rest = _cut(rest + block, characters, continues=True)
        yield from pieces
    if rest:
        yield from _cut(rest, characters, continues=False)


def with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Yield each item with the next one; the last one with None."""
    previous: Item | None = None
    for item in items:
        if previous is not None:
            yield previous, item
        previous = item
    if previous is not None:
        yield previous, None


def _warn_of_damage(document: Unreadable, number: int) -> None:
    if number <= _MOST_LOGGED:
        log.warning(f"skipped: {document.reason}")
    if number == _MOST_LOGGED:
        log.warning("further skipped documents are only counted")


def _pieces_of_document(document: str | Iterable[str], start: Position) -> Iterator[Piece]:
    """Yield the pieces of one document from ``start`` on."""
    offset = 0
    for number, (text, following) in enumerate(with_next(cut(document))):
        if number >= start.piece:
            is_last = following is None
            next_position = (
                Position(start.part, start.document + 1)
                if is_last
                else Position(start.part, start.document, number + 1)
            )
            yield Piece(text, number == 0, next_position, offset)
        offset += len(text)


def _cut(text: str, characters: int, continues: bool) -> Iterator[str]:
    """Yield the pieces of ``text``. If the document ``continues``, the last one is to be cut with the next block."""
    start = 0
    while (end := _end_of_piece(text, start + characters, characters, continues)) is not None:
        yield text[start:end]
        start = end
    yield text[start:]


def _end_of_piece(text: str, least: int, characters: int, continues: bool) -> int | None:
    """Return the first position from ``least`` on at which ``text`` can be cut, or None."""
    limit = least + _LONGEST_LINE * characters
    found = _LINE.search(text, least, limit + 1)
    if found is None and not (continues and limit >= len(text)):
        found = _WORD.search(text, least)
    return None if found is None else found.start()
