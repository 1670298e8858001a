"""Documents to pieces: long ones are cut where tokens cannot straddle, so that no worker waits for one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ds_gpt2.data.sources import Source

PIECE_CHARACTERS = 16_384

_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_WORD = re.compile(r"(?<=\S)[ \n](?=\S)")
_LONGEST = 16  # pieces: where no line ends for so long, words do


@dataclass(frozen=True, order=True)
class Place:
    """A piece of a source: where to go on."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of one document; whole documents are one piece unless they are long."""

    text: str
    begins_document: bool
    then: Place  # of the piece after it


@dataclass
class Counts:
    """Documents that a source had."""

    documents: int = 0  # of which pieces were made
    empty: int = 0  # nothing but white space
    null: int = 0

    def add(self, document: str | None) -> bool:
        """Whether there is anything to tokenise."""
        if document is None:
            self.null += 1
        elif not document.strip():
            self.empty += 1
        else:
            self.documents += 1
            return True
        return False


def pieces_of(source: Source, start: Place) -> Iterator[tuple[Piece, Counts]]:
    """All pieces from ``start`` on, each with what was passed over or begun since the one before."""
    counts, place = Counts(), start
    for number in range(start.part, len(source.parts)):
        if number + 1 < len(source.parts):
            source.parts[number + 1].prefetch()
        for document, text in enumerate(source.parts[number].documents(place.document), start=place.document):
            goes_on = place.piece > 0  # its beginning was counted then
            if not goes_on and not counts.add(text):
                continue
            assert text is not None
            found = list(cut(text))
            for order in range(place.piece, len(found)):
                then = Place(number, document, order + 1) if order + 1 < len(found) else Place(number, document + 1)
                yield Piece(found[order], order == 0, then), counts
                counts = Counts()
            place = Place(number, document + 1)
        place = Place(number + 1)
    yield Piece("", False, place), counts  # what came after the last


def cut(document: str, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long document before a newline between two printing characters; where lines do not end, before a space.

    GPT-2's split gives such a newline a token of its own, and such a space to the word after it, so the pieces' tokens
    are the whole document's.
    """
    start = 0
    while len(document) - start > characters:
        found = _LINE.search(document, start + characters, start + _LONGEST * characters)
        found = found or _WORD.search(document, start + characters)
        if found is None:
            break
        yield document[start : found.start()]
        start = found.start()
    if document[start:]:
        yield document[start:]
