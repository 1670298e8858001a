"""Rows of tokens for the batched scoring of items: how long they are, which form a batch, and their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ds_gpt2.common.formatting import counted
from ds_gpt2.data.items import Item

# Tokens of a batch: on a CPU enough for efficient matrix products, on a GPU for few kernel launches, and far fewer than
# a micro-batch of training has.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_SHORTEST_SHARE = 0.9  # length of a batch's shortest row, at least, as a share of its longest
_TIME_MULTIPLE = 8  # attention kernels require that the length of a masked row is a multiple of this
_ROW_TOKENS = 2048  # of the longest row, unless the model's context is longer; the mask of a row is quadratic in it


def truncate(item: Item, sequence_length: int) -> Item:
    """Return ``item`` cut to what a model of this sequence length can process.

    If an ending does not fit with the context before it, each ending gets its own copy of the context, cut at the
    start, as in lm-evaluation-harness 0.4.13 (``HFLM._loglikelihood_tokens`` in ``lm_eval/models/huggingface.py``): the
    copies are unscored tokens of the endings, and the item's context is empty. An ending with more than
    ``sequence_length`` scored tokens, which the harness refuses, keeps the first ones and one token before them.
    """
    if not _is_too_long(item, sequence_length):
        return item
    endings, unscored = [], []
    for number, ending in enumerate(item.endings):
        row = np.concatenate([item.context, ending])
        first = len(item.context) + item.first_scored(number)
        end = min(len(row), first + sequence_length)
        start = max(0, end - (sequence_length + 1))  # the last token is no input
        endings.append(row[start:end])
        unscored.append(first - start)
    return replace(item, context=item.context[:0], endings=endings, unscored=np.array(unscored, np.int32))


def describe_truncation(items: Sequence[Item], sequence_length: int) -> str | None:
    """Return a text that says how many items ``truncate`` cuts, and how many of them in the ending; None if none."""
    cut = [item for item in items if _is_too_long(item, sequence_length)]
    if not cut:
        return None
    text = f"{counted(len(cut), 'item')} longer than {sequence_length:,} tokens, cut at the start"
    in_ending = sum(_longest_scored(item) > sequence_length for item in cut)
    return text + (f", and {in_ending:,} of them also at the end of an ending" if in_ending else "")


def _is_too_long(item: Item, sequence_length: int) -> bool:
    return len(item.context) + max(map(len, item.endings)) - 1 > sequence_length


def _longest_scored(item: Item) -> int:
    return max(len(ending) - item.first_scored(number) for number, ending in enumerate(item.endings))


def row_length(item: Item) -> int:
    """Return the tokens in the row of an item: the context, and all but the last token of each ending."""
    return len(item.context) + sum(len(ending) - 1 for ending in item.endings)


def batch_tokens(device_type: str) -> int:
    """Return the most tokens of a batch, padding included."""
    return _BATCH_TOKENS.get(device_type, _BATCH_TOKENS["cuda"])


def longest_row(sequence_length: int) -> int:
    """Return the most tokens of a row; an item that has more is computed in parts of its endings."""
    return max(_ROW_TOKENS, sequence_length)


def batches_of_lengths(lengths: npt.NDArray[np.int64], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Return the indices of the rows of each batch, longest rows first.

    The rows of a batch are of similar length, which limits padding. A batch has at most ``tokens`` tokens, padding
    included; a longer row forms a batch alone.

    Args:
        lengths: (rows,) tokens.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    while len(order):
        longest = max(1, int(lengths[order[0]]))
        similar = int((lengths[order] >= _SHORTEST_SHARE * longest).sum())
        size = max(1, min(similar, tokens // longest))
        batches.append(order[:size])
        order = order[size:]
    return batches


@dataclass(frozen=True)
class RowBatch:
    """Rows padded to one length; a row is the context and all but the last token of each ending."""

    tokens: npt.NDArray[np.int64]  # (rows, time)
    positions: npt.NDArray[np.int64]  # (rows, time)
    branches: npt.NDArray[np.int16]  # (rows, time) 0: context; from 1 on: that ending; -1: padding
    targets: npt.NDArray[np.int64]  # (rows, time, endings) the next token of each ending after this position
    scored: npt.NDArray[np.bool_]  # (rows, time, endings) whether there is such a token, and it is scored


def collate(items: Sequence[Item]) -> RowBatch:
    """Return the arrays of items that are already truncated."""
    longest = max(1, *map(row_length, items))
    shape = len(items), -(-longest // _TIME_MULTIPLE) * _TIME_MULTIPLE
    of_endings = *shape, max(len(item.endings) for item in items)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    branches = np.full(shape, -1, np.int16)
    targets, scored = np.zeros(of_endings, np.int64), np.zeros(of_endings, np.bool_)
    for row, item in enumerate(items):
        start = end = len(item.context)
        tokens[row, :start] = item.context
        positions[row, :start] = np.arange(start)
        branches[row, :start] = 0
        for number, ending in enumerate(item.endings):
            own = slice(end, end + len(ending) - 1)
            tokens[row, own] = ending[:-1]
            positions[row, own] = np.arange(start, start + len(ending) - 1)
            branches[row, own] = 1 + number
            if (first := item.first_scored(number)) == 0:  # the end of the context predicts the first token
                targets[row, start - 1, number], scored[row, start - 1, number] = ending[0], True
            first = max(1, first)
            predicting = slice(end + first - 1, max(end + first, own.stop + 1) - 1)
            targets[row, predicting, number], scored[row, predicting, number] = ending[first:], True
            end = own.stop
    return RowBatch(tokens, positions, branches, targets, scored)
