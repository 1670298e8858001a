"""Which tokens are held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ds_gpt2.data.dataset import Split


class Holdout(Protocol):
    """A rule; it sees only what comes before a piece, so it is the same when a preparation goes on."""

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        """The split of a piece, and how many of its tokens at most; the rest goes to the other split.

        Args:
            number: of the piece, from 1 on.
            is_last: whether no piece comes after it.
            held_out: validation tokens so far.
        """


@dataclass(frozen=True)
class EveryPiece:
    """Each ``every``-th; the last one if there are fewer: a sample of everything, for text in any order."""

    every: int

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        alone = is_last and 1 < number < self.every
        return ("val" if number % self.every == 0 or alone else "train"), None


@dataclass(frozen=True)
class FirstTokens:
    """The first ``tokens``, as build-nanogpt's fineweb.py does with its first shard."""

    tokens: int

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        room = self.tokens - held_out
        return ("val", room) if room > 0 else ("train", None)
