"""Rules that select the tokens held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ds_gpt2.data.dataset import Split


class Holdout(Protocol):
    """A rule. It depends only on the preceding pieces, so a continued preparation gives the same result."""

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        """Return the split of a piece, and the most tokens of it for that split (None: all).

        The remaining tokens go to the other split.

        Args:
            number: of the piece, from 1 on.
            is_last: whether no piece follows.
            held_out: validation tokens so far.
        """


@dataclass(frozen=True)
class EveryPiece:
    """Hold out every ``every``-th piece, or the last one if there are fewer: a sample of text in any order."""

    every: int

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        is_only_one = is_last and 1 < number < self.every
        return ("val" if number % self.every == 0 or is_only_one else "train"), None


@dataclass(frozen=True)
class FirstTokens:
    """Hold out the first ``tokens`` tokens, as build-nanogpt's fineweb.py holds out its first shard."""

    tokens: int

    def split_of(self, number: int, is_last: bool, held_out: int) -> tuple[Split, int | None]:
        missing = self.tokens - held_out
        return ("val", missing) if missing > 0 else ("train", None)
