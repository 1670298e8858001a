"""Score items with several endings: the log-likelihood of every ending, by a reference and by a faster batched way.

The batched implementation computes an item's context once. A row holds the context followed by the endings. The
positions of each ending continue those of the context, and it attends to the context and to itself only. Rows of
similar length form a batch, and the output head is applied only at positions that predict a scored token.

An item with one ending asks for a word: it is answered if the ending is what greedy decoding generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ds_gpt2.data.items import Item
from ds_gpt2.evaluation.row_batches import (
    batch_tokens,
    batches_of_lengths,
    collate,
    longest_row,
    row_length,
    truncate,
)
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.loss import chunk_tokens, rows_at_once
from ds_gpt2.model.matmul import linear
from ds_gpt2.model.shape import VOCABULARY, ModelShape

MEASURES = ("acc", "acc_norm", "acc_norm_bytes", "acc_norm_chars")

_NORM_ROWS = 4096  # of the head, whose norms are computed at once: in fp32, a copy
REFERENCE_TOKENS = 768  # of an item whose logits the reference computes at once; more than any of HellaSwag has

# Two endings count as tied if their sums differ by less than ``CLOSE`` times the root of the sum of their squared
# ``rounding``. Tied items are scored again by the reference. On CPUs, the difference of two sums deviated from the
# reference by at most 0.66 of that root, and by 0.03 to 0.14 of it in the root mean square (7 M and 124 M parameters in
# bf16, 7 M in fp32; random, scaled-up and trained weights; benchmarks/results/hellaswag_cpu.json). In bf16 3 to 9 % of
# the items were scored again, in fp32 none. Not measured: GPUs, and evaluations other than HellaSwag. Two tokens of an
# item with one ending are compared in the same way (measured in tests only).
CLOSE = 1.0

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """The scores of a model on items. An item with fewer endings than others has -inf in place of the missing ones."""

    sums: Array  # (items, endings) log-likelihood of each ending, nats
    rounding: Array  # (items, endings) scale of the rounding error of a sum, nats; see ``CLOSE``
    lengths: Array  # (measures, items, endings) the divisor of a sum for each of ``MEASURES``
    labels: npt.NDArray[np.int64]  # (items,) index of the correct ending
    greedy: Mask  # (items,) whether an item's only ending is what greedy decoding generates; False if it has several
    uncertain: Mask  # (items,) whether that is not certain, because of rounding

    def answers(self) -> npt.NDArray[np.int64]:
        """Return the index of the chosen ending, (measures, items); the first one of a tie."""
        return self._normalized(self.sums).argmax(axis=2)

    def _normalized(self, values: Array) -> Array:
        """Return ``values`` (items, endings) by each measure; an ending of length 0 is the least likely one."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return values / self.lengths

    def correct(self) -> npt.NDArray[np.int64]:
        """Return the number of correct answers, (measures,)."""
        return (self.answers() == self.labels).sum(axis=1)

    def close(self) -> Mask:
        """Return a mask (items,) of the items whose answer is not certain.

        Their two best endings are tied within rounding by any measure, or greedy decoding is not certain.
        """
        values, error = self._normalized(self.sums), CLOSE * self._normalized(self.rounding)
        best = self.answers()[..., None]
        gaps = np.take_along_axis(values, best, axis=2) - values
        tied = gaps <= np.hypot(np.take_along_axis(error, best, axis=2), error)
        # The best ending is always tied with itself.
        return (tied.sum(axis=2) > 1).any(axis=0) | self.uncertain


def score(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """Return the scores of ``items``. Items whose answer may depend on rounding are scored again by ``score_one``.

    Every answer so far equaled that of ``score_one`` alone; see ``CLOSE`` for what was measured.

    Args:
        model: in eval mode. Items that are too long for it are cut, see ``truncate``.
        items: at least one.
        progress: called after each batch and after each item that is scored again.
    """
    scores = score_batched(model, items, progress)
    sums, greedy = scores.sums.copy(), scores.greedy.copy()
    for number in np.flatnonzero(scores.close()).tolist():
        item = items[number]
        sums[number, : len(item.endings)] = score_one(model, item)
        if len(item.endings) == 1:
            greedy[number] = is_greedy(model, item)
        progress()
    return replace(scores, sums=sums, greedy=greedy)


@torch.no_grad()
def score_one(model: GPT2, item: Item) -> Array:
    """Return the log-likelihoods (endings,) of one item, nats: the reference implementation.

    It evaluates a row of context and ending for each ending, as build-nanogpt's hellaswag.py does.

    Args:
        model: in eval mode.
    """
    tokens, scored = _rows(model, item)
    device = model.wte.weight.device
    rows = torch.from_numpy(tokens).to(device)
    if tokens.size > REFERENCE_TOKENS:  # in parts, to limit the memory of the logits
        return np.array([_sum_of_long(model, row, mask) for row, mask in zip(rows, scored, strict=True)])
    logits = model.logits(rows[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    ending_losses = losses.view(len(rows), -1).cpu().double().numpy() * scored[:, 1:]
    return -ending_losses.sum(axis=1)


@torch.no_grad()
def is_greedy(model: GPT2, item: Item) -> bool:
    """Return whether each token of an item's only ending is the most likely one after those before it.

    This is the reference implementation, which lm-evaluation-harness 0.4.13 calls ``is_greedy``. The first of equal
    logits counts.

    Args:
        model: in eval mode.
    """
    tokens, scored = _rows(model, item)
    rows = torch.from_numpy(tokens).to(model.wte.weight.device)
    at = np.flatnonzero(scored[0]) - 1  # the positions that predict
    hidden = model.hidden(rows[:, :-1])[0, at]
    chosen = [linear(part, model.wte.weight[:VOCABULARY]).argmax(dim=1) for part in hidden.split(_chunk(model))]
    return bool((torch.cat(chosen) == rows[0, at + 1]).all())


def _rows(model: GPT2, item: Item) -> tuple[npt.NDArray[np.int64], Mask]:
    """Return the tokens of a row for each ending, padded with 0, and which of them are scored; (endings, time)."""
    item = truncate(item, model.shape.sequence_length)
    start = len(item.context)
    tokens = np.zeros((len(item.endings), start + max(map(len, item.endings))), np.int64)
    scored = np.zeros(tokens.shape, np.bool_)
    for row, ending in enumerate(item.endings):
        tokens[row, :start] = item.context
        tokens[row, start : start + len(ending)] = ending
        scored[row, start + item.first_scored(row) : start + len(ending)] = True
    return tokens, scored


def _sum_of_long(model: GPT2, row: torch.Tensor, scored: Mask) -> float:
    """Return the log-likelihood of the scored tokens of a row (time,), with the logits of a chunk at a time."""
    at = np.flatnonzero(scored) - 1
    hidden, targets = model.hidden(row[None, :-1])[0, at], row[at + 1]
    size, losses = _chunk(model), []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = linear(part, model.wte.weight[:VOCABULARY])
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
    return -float(torch.cat(losses).double().sum()) if losses else 0.0


def _chunk(model: GPT2) -> int:
    """Return the number of tokens whose logits exist at the same time."""
    return chunk_tokens(model.wte.weight.shape[0], model.wte.weight.device)


@torch.no_grad()
def score_batched(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """Return the scores of ``items`` by the batched implementation alone; arguments as for ``score``."""
    batches = batches_of(model, items)
    parts = []
    for batch in batches:
        parts.append(_score_items(model, [truncate(items[number], model.shape.sequence_length) for number in batch]))
        progress()
    order = np.argsort(np.concatenate(batches))
    endings = max(part.sums.shape[1] for part in parts)
    padded = [_padded(part, endings) for part in parts]
    return Scores(
        sums=np.concatenate([part.sums for part in padded])[order],
        rounding=np.concatenate([part.rounding for part in padded])[order],
        lengths=np.concatenate([part.lengths for part in padded], axis=1)[:, order],
        labels=np.concatenate([part.labels for part in padded])[order],
        greedy=np.concatenate([part.greedy for part in padded])[order],
        uncertain=np.concatenate([part.uncertain for part in padded])[order],
    )


def _padded(scores: Scores, endings: int) -> Scores:
    """Return ``scores`` with as many columns as ``endings``."""
    width = (0, 0), (0, endings - scores.sums.shape[1])
    return replace(
        scores,
        sums=np.pad(scores.sums, width, constant_values=-np.inf),
        rounding=np.pad(scores.rounding, width),
        lengths=np.pad(scores.lengths, ((0, 0), *width), constant_values=1.0),
    )


def batches_of(model: GPT2, items: Sequence[Item]) -> list[npt.NDArray[np.int64]]:
    """Return the indices of the items of each batch of ``score``; they depend only on the items and the model."""
    lengths = [row_length(truncate(item, model.shape.sequence_length)) for item in items]
    return batches_of_lengths(np.array(lengths), batch_tokens(model.wte.weight.device.type))


def _score_items(model: GPT2, items: Sequence[Item]) -> Scores:
    """Return the scores of the items of one batch, which are truncated."""
    limit = longest_row(model.shape.sequence_length)
    if max(map(row_length, items)) <= limit:
        found = _score_batch(model, items)
    else:
        found = _stacked([_score_in_parts(model, item, limit) for item in items])
    sums, variances, steps = (values.cpu().numpy() for values in found)
    exists = np.array([[number < len(item.endings) for number in range(sums.shape[1])] for item in items])
    single = exists.sum(axis=1) == 1
    unlike, uncertain, certainly_unlike = (single & (steps[:, kind] > 0) for kind in range(3))
    labels = np.array([item.label for item in items])
    return Scores(
        sums=np.where(exists, sums, -np.inf),
        rounding=np.sqrt(variances),
        lengths=_lengths(items),
        labels=labels,
        greedy=single & ~unlike,
        uncertain=uncertain & ~certainly_unlike,
    )


def _score_in_parts(model: GPT2, item: Item, limit: int) -> tuple[torch.Tensor, ...]:
    """Return ``_score_batch`` of an item whose row is longer than ``limit``: of some endings at a time."""
    parts: list[list[int]] = [[]]
    length = len(item.context)
    for number, ending in enumerate(item.endings):
        if parts[-1] and length + len(ending) - 1 > limit:
            parts.append([])
            length = len(item.context)
        parts[-1].append(number)
        length += len(ending) - 1
    found = [_score_batch(model, [_with_endings(item, numbers)]) for numbers in parts]
    sums, variances, steps = zip(*found, strict=True)
    return torch.cat(sums, dim=1), torch.cat(variances, dim=1), steps[0]


def _with_endings(item: Item, numbers: Sequence[int]) -> Item:
    """Return ``item`` with these of its endings only; its label is unchanged."""
    unscored = None if item.unscored is None else item.unscored[list(numbers)]
    return replace(item, endings=[item.endings[number] for number in numbers], unscored=unscored)


def _stacked(found: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Return the tables of several items as one, padded to the same number of endings."""
    most = max(sums.shape[1] for sums, _, _ in found)
    kinds = zip(
        *([*(F.pad(each, (0, most - each.shape[1])) for each in one[:2]), one[2]] for one in found), strict=True
    )
    return tuple(torch.cat(kind) for kind in kinds)


def _score_batch(model: GPT2, items: Sequence[Item]) -> tuple[torch.Tensor, ...]:
    """Return the log-likelihood and the squared rounding of each ending, both (items, endings) fp64, on the device.

    The third result, (items, 3) fp64, counts tokens of items with one ending, see ``_unlike_greedy``.
    """
    batch = collate(items)
    device = model.wte.weight.device
    predicting = torch.from_numpy(np.flatnonzero(batch.scored.any(axis=2))).to(device)  # flat positions
    tokens, positions, branches, targets, scored = (
        torch.from_numpy(array).to(device)
        for array in (batch.tokens, batch.positions, batch.branches, batch.targets, batch.scored)
    )
    keys, queries = branches[:, None, :], branches[:, :, None]
    mask = ((keys == 0) | (keys == queries)).tril()
    hidden = model.hidden(tokens, positions, mask[:, None])
    found = _token_scores(model, hidden.flatten(0, 1)[predicting], targets.flatten(0, 1)[predicting])
    log_likelihoods, variances = (_sums(values.double(), predicting, scored) for values in found[:2])
    rows = predicting // tokens.shape[1]
    steps = torch.zeros(len(items), found[2].shape[1], dtype=torch.float64, device=device)
    return log_likelihoods, variances, steps.index_add(0, rows, found[2].double())


def _token_scores(model: GPT2, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return log-likelihoods and their variances, both (tokens, endings) fp32, of ``targets`` (tokens, endings).

    ``hidden`` is (tokens, width). The logits of the whole vocabulary exist for one chunk of tokens at a time. The third
    result, (tokens, 3), is that of ``_unlike_greedy`` if there is one ending, otherwise zeros.
    """
    head = model.wte.weight
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in head.split(_NORM_ROWS)]
    lengths = torch.cat(norms)
    size = _chunk(model)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    results = [_chunk_scores(model, part, target, lengths) for part, target in parts]
    return tuple(torch.cat(kind) for kind in zip(*results, strict=True))


def _chunk_scores(
    model: GPT2, hidden: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return ``_token_scores`` of one chunk of tokens.

    Args:
        lengths: (padded vocabulary,) norms of the rows of the head, fp32.
    """
    logits = linear(hidden, model.wte.weight)  # (chunk, padded vocabulary)
    logits[:, VOCABULARY:] = -torch.inf
    log_likelihood = _log_softmax(logits, targets)
    norms = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=torch.float32)
    logit = logits.gather(1, targets).float()
    variance = _logit_variance(model.shape, norms * lengths[targets], logit, hidden.dtype)
    steps = log_likelihood.new_zeros(len(hidden), 3)
    if targets.shape[1] == 1:
        best = logits.topk(2, dim=1).indices
        other = torch.where(best[:, :1] == targets, best[:, 1:], best[:, :1])
        of_other = logits.gather(1, other).float()
        other_variance = _logit_variance(model.shape, norms * lengths[other], of_other, hidden.dtype)
        steps = _unlike_greedy(logit - of_other, CLOSE * (variance + other_variance).sqrt())
    return log_likelihood, variance + _softmax_variance(log_likelihood), steps


def _unlike_greedy(gap: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return whether a token is not the most likely one, whether that is uncertain, and whether it is certain.

    Args:
        gap: (tokens, 1) logit of the token minus the largest logit of another token.
        error: (tokens, 1) largest rounding error of ``gap``.

    Returns:
        (tokens, 3) fp32, 0 or 1.
    """
    return torch.cat([gap <= 0, gap.abs() <= error, gap < -error], dim=1).float()


def _log_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihoods (tokens, endings), fp32, of ``targets`` (tokens, endings)."""
    rows = rows_at_once(len(logits), logits.device)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.log_softmax(part, dim=1, dtype=torch.float32).gather(1, target) for part, target in parts])


def _logit_variance(shape: ModelShape, spread: torch.Tensor, logit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the estimated variance of the rounding error of a logit; all tensors are (tokens, endings).

    Each layer rounds the hidden state twice, and the final norm rounds it once. A rounding changes each component
    independently, and so a logit by about epsilon x |hidden| x |row of the head| / sqrt(width); ``spread`` is the
    product of the two norms. The logit itself is rounded too.
    """
    of_hidden = (2 * shape.layers + 1) * spread**2 / shape.width
    return torch.finfo(dtype).eps ** 2 * (of_hidden + logit**2)


def _softmax_variance(log_likelihood: torch.Tensor) -> torch.Tensor:
    """Return the estimated variance of the rounding errors of the log-softmax, which is computed in fp32."""
    return (4 * torch.finfo(torch.float32).eps * log_likelihood) ** 2


def _sums(values: torch.Tensor, indices: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the sums (rows, endings) of ``values`` (tokens, endings) over the positions where ``scored`` is True.

    ``scored`` is (rows, time, endings); ``indices`` (tokens,) are the flat positions of ``values``.
    """
    table = values.new_zeros(scored.shape)
    table.view(-1, scored.shape[2])[indices] = values
    return (table * scored).sum(dim=1)


def _lengths(items: Sequence[Item]) -> Array:
    """Return the divisors (measures, items, endings) of ``MEASURES``: 1, tokens, bytes and characters."""
    lengths = np.ones((len(MEASURES), len(items), max(len(item.endings) for item in items)))
    for number, item in enumerate(items):
        tokens = [max(1, len(ending) - item.first_scored(row)) for row, ending in enumerate(item.endings)]
        lengths[1:, number, : len(item.endings)] = tokens, item.bytes, item.characters
    return lengths
