"""Documents to pieces: long ones are cut where tokens cannot straddle, so that no worker waits for one of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

from ds_gpt2.data.prepare.documents import Document, Unreadable
from ds_gpt2.data.prepare.sources import Source
from ds_gpt2.data.prepare.unpacking import control_characters

log = logging.getLogger(__name__)

PIECE_CHARACTERS = 16_384
SEPARATOR = "<|endoftext|>"  # as other programs write it between documents

# They begin with the character itself, which is found thirty times as fast as one that a look-behind leads to.
_LINE = re.compile(r"\n(?<=\S\n)(?=\S)")
_WORD = re.compile(r" (?<=\S )(?=\S)")
_ALWAYS = ("documents", "empty", "null")
_MOST_NAMED = 20  # damaged documents that are logged
_LONGEST = 16  # pieces: where no line ends for so long, words do

Item = TypeVar("Item")


@dataclass(frozen=True, order=True)
class Position:
    """A piece of a source: where to go on."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of one document; whole documents are one piece unless they are long."""

    text: str
    begins_document: bool
    then: Position  # of the piece after it
    start: int = 0  # characters of the document before it


@dataclass
class Counts:
    """Documents that a source had."""

    documents: int = 0  # of which pieces were made
    empty: int = 0  # nothing but white space
    null: int = 0
    unreadable: int = 0  # damaged
    endoftext: int = 0  # times that SEPARATOR stands in the text, which does not separate there
    replacement: int = 0  # characters U+FFFD: of invalid bytes, or of the text itself
    control: int = 0  # control characters that do not occur in text, such as NUL

    def to_dict(self) -> dict[str, int]:
        """What is recorded: always the first three, the others if there are any."""
        return {name: count for name, count in asdict(self).items() if count or name in _ALWAYS}

    def add(self, document: Document) -> bool:
        """Whether there is anything to tokenise."""
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
    """All pieces from ``start`` on, each with what was skipped or begun since the one before.

    The first damaged documents are logged, and the first <|endoftext|>, U+FFFD and control character in a text.
    """
    counts, place, damaged, warned = Counts(), start, 0, False
    marks = _Marks()
    for number in range(start.part, len(source.parts)):
        if number + 1 < len(source.parts):
            source.parts[number + 1].prefetch()
        for order, document in enumerate(source.parts[number].documents(place.document), start=place.document):
            goes_on = place.piece > 0  # its beginning was counted then
            if not goes_on and not counts.add(document):
                if isinstance(document, Unreadable):
                    damaged += 1
                    _warn_of_damage(document, damaged)
                continue
            assert document is not None and not isinstance(document, Unreadable)
            for piece in _pieces_of_one(document, Position(number, order, place.piece)):
                marks.look_at(piece, counts, source.parts[number].name, order)
                counts.endoftext += piece.text.count(SEPARATOR)
                if counts.endoftext and not warned:
                    warned = True
                    log.warning(
                        f"{source.parts[number].name} has {SEPARATOR} in its text, read as ordinary characters; if it"
                        f" separates documents, start again with --separator '{SEPARATOR}'"
                    )
                yield piece, counts
                counts = Counts()
            place = Position(number, order + 1)
        place = Position(number + 1)
    yield Piece("", False, place), counts  # what came after the last


class _Marks:
    """Count characters that do not belong into text, and warn of the first of each kind."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def look_at(self, piece: Piece, counts: Counts, part: str, document: int) -> None:
        replacement, control = piece.text.count("\ufffd"), control_characters(piece.text)
        counts.replacement += replacement
        counts.control += control
        where = f"{part}, document {document + 1}, character"
        if replacement and self._is_first("replacement"):
            index = piece.text.index("\ufffd")
            log.warning(
                f"{where} {piece.start + index + 1:,}: U+FFFD in the text (invalid bytes are replaced by it); more of"
                " them are only counted. If the file has another encoding, give --encoding"
            )
        if control and self._is_first("control"):
            index = next(index for index, each in enumerate(piece.text) if control_characters(each))
            log.warning(
                f"{where} {piece.start + index + 1:,}: control character U+{ord(piece.text[index]):04X} in the text;"
                " more of them are only counted"
            )

    def _is_first(self, kind: str) -> bool:
        is_first = kind not in self._warned
        self._warned.add(kind)
        return is_first


def cut(document: str | Iterable[str], characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long document before a newline between two printing characters; where lines do not end, before a space.

    GPT-2's split gives such a newline a token of its own, and such a space to the word after it, so the pieces' tokens
    are the whole document's. Of one that comes in blocks no more is held than a piece needs; its pieces are the same.
    """
    rest = ""
    for block in [document] if isinstance(document, str) else document:
        *pieces, rest = _cut(rest + block, characters, goes_on=True)
        yield from pieces
    if rest:
        yield from _cut(rest, characters, goes_on=False)


def with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Each with the one after it; None after the last."""
    before: Item | None = None
    for item in items:
        if before is not None:
            yield before, item
        before = item
    if before is not None:
        yield before, None


def _warn_of_damage(document: Unreadable, number: int) -> None:
    if number <= _MOST_NAMED:
        log.warning(f"skipped: {document.reason}")
    if number == _MOST_NAMED:
        log.warning("more documents that are skipped are only counted")


def _pieces_of_one(document: str | Iterable[str], start: Position) -> Iterator[Piece]:
    begin = 0
    for number, (text, following) in enumerate(with_next(cut(document))):
        if number >= start.piece:
            is_last = following is None
            then = (
                Position(start.part, start.document + 1)
                if is_last
                else Position(start.part, start.document, number + 1)
            )
            yield Piece(text, number == 0, then, begin)
        begin += len(text)


def _cut(text: str, characters: int, goes_on: bool) -> Iterator[str]:
    """Its pieces; the last is what is left, if the document ``goes_on`` to be cut with what follows."""
    start = 0
    while (end := _end_of_piece(text, start + characters, characters, goes_on)) is not None:
        yield text[start:end]
        start = end
    yield text[start:]


def _end_of_piece(text: str, least: int, characters: int, goes_on: bool) -> int | None:
    near = least + _LONGEST * characters
    found = _LINE.search(text, least, near + 1)
    if found is None and not (goes_on and near >= len(text)):
        found = _WORD.search(text, least)
    return None if found is None else found.start()
