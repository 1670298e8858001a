"""Which ending a model finds likeliest: HellaSwag's items scored by a plain loop, and the same answers much sooner.

The fast way computes an item's context once. A row holds the context and, behind it, the four endings; each ending
counts its positions on from the context and looks at the context and at itself. Rows of like length go through the
model together, and the output head sees only the places that predict a token of an ending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ds_gpt2.data.hellaswag import ENDINGS, Item
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.loss import chunk_tokens, rows_at_once
from ds_gpt2.model.shape import VOCABULARY, ModelShape

MEASURES = ("acc", "acc_norm", "acc_norm_bytes", "acc_norm_chars")

# Tokens that go through the model at once: on a CPU enough for full matrix products, on a GPU for few launches, and
# far fewer than a micro-batch of training holds.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_LIKE = 0.9  # of the longest row is the shortest of a batch, at least
_TIME_MULTIPLE = 8  # what attention kernels want the length of a masked row to be a multiple of

# Two endings are too close to tell apart if their sums differ by less than so many times the root of the sum of their
# squared ``rounding``. On CPUs that difference was off from the plain loop's by 0.66 of it at most and by 0.03 to 0.14
# in the root mean square: 7 M and 124 M parameters in bf16, 7 M in fp32, random weights, scaled up, and trained
# (benchmarks/results/hellaswag_cpu.json). The same items are then scored again: 3 to 9 in a hundred, none in fp32.
CLOSE = 1.0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a model makes of items."""

    sums: Array  # (items, 4) log-likelihood of each ending, nats
    rounding: Array  # (items, 4) the scale of what rounding does to a sum, nats: see ``CLOSE``
    lengths: Array  # (measures, items, 4) what each of ``MEASURES`` divides a sum by
    labels: npt.NDArray[np.int64]  # (items,) which ending is right

    def answers(self) -> npt.NDArray[np.int64]:
        """The ending chosen, (measures, items); of equals the first."""
        return (self.sums / self.lengths).argmax(axis=2)

    def correct(self) -> npt.NDArray[np.int64]:
        """How many answers are right, (measures,)."""
        return (self.answers() == self.labels).sum(axis=1)

    def close(self) -> npt.NDArray[np.bool_]:
        """Items (items,) whose two best endings, by any measure, lie closer than rounding lets one tell."""
        values, doubt = self.sums / self.lengths, CLOSE * self.rounding / self.lengths
        best = self.answers()[..., None]
        gaps = np.take_along_axis(values, best, axis=2) - values
        rivals = gaps <= np.hypot(np.take_along_axis(doubt, best, axis=2), doubt)
        return (rivals.sum(axis=2) > 1).any(axis=0)  # the best is its own rival


def score(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """Score ``items``: every answer is the one that ``score_one`` gives, whatever else is in the batch.

    Args:
        model: in eval mode; items that are longer than its context lose the beginning of theirs.
        progress: called after each batch.
    """
    scores = score_together(model, items, progress)
    sums = scores.sums.copy()
    for number in np.flatnonzero(scores.close()).tolist():
        sums[number] = score_one(model, items[number])
        progress()
    return replace(scores, sums=sums)


@torch.no_grad()
def score_one(model: GPT2, item: Item) -> Array:
    """The log-likelihoods (4,) of the endings, nats: four rows of context and ending, as build-nanogpt does it."""
    item = fit(item, model.shape.sequence_length)
    start = len(item.context)
    tokens = np.zeros((ENDINGS, start + max(map(len, item.endings))), np.int64)
    scored = np.zeros(tokens.shape, np.bool_)
    for row, ending in enumerate(item.endings):
        tokens[row, :start] = item.context
        tokens[row, start : start + len(ending)] = ending
        scored[row, start : start + len(ending)] = True
    device = model.wte.weight.device
    rows = torch.from_numpy(tokens).to(device)
    logits = model.logits(rows[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    kept = losses.view(ENDINGS, -1).cpu().double().numpy() * scored[:, 1:]
    return -kept.sum(axis=1)


@torch.no_grad()
def score_together(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """The fast way alone: sums as they come, with what rounding does to them."""
    device = model.wte.weight.device
    fitted = [fit(item, model.shape.sequence_length) for item in items]
    batches = make_batches(fitted, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"]))
    results = []
    for batch in batches:
        results.append(_score_batch(model, [fitted[number] for number in batch]))
        progress()
    sums, variances = (torch.cat(parts).cpu().numpy() for parts in zip(*results, strict=True))
    back = np.argsort(np.concatenate(batches))
    labels = np.array([item.label for item in items])
    return Scores(sums[back], np.sqrt(variances[back]), _lengths(fitted), labels)


def fit(item: Item, sequence_length: int) -> Item:
    """The item as the model can take it.

    The context loses its beginning until it and the longest ending fit, all but one token of it if need be; an
    ending that is longer than the model's context counts up to there.
    """
    endings = [ending[:sequence_length] for ending in item.endings]
    room = sequence_length - (max(map(len, endings)) - 1)  # an ending's last token predicts nothing
    return replace(item, context=item.context[-room:], endings=endings)


def row_length(item: Item) -> int:
    """Tokens of an item's row: the context, and of each ending all but the last."""
    return len(item.context) + sum(len(ending) - 1 for ending in item.endings)


def make_batches(items: Sequence[Item], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Numbers of the items of each batch, the longest first.

    A batch's rows are of like length, so that little of them is padding, and with it have at most ``tokens``; a row
    that is longer goes alone.
    """
    lengths = np.array([row_length(item) for item in items])
    order = np.argsort(-lengths, kind="stable")
    batches = []
    while len(order):
        longest = int(lengths[order[0]])
        alike = int((lengths[order] >= _LIKE * longest).sum())
        size = max(1, min(alike, tokens // longest))
        batches.append(order[:size])
        order = order[size:]
    return batches


@dataclass(frozen=True)
class _Batch:
    """Rows of one length, padded; a row is the context and of each ending all tokens but the last."""

    tokens: npt.NDArray[np.int64]  # (rows, time)
    positions: npt.NDArray[np.int64]  # (rows, time)
    branches: npt.NDArray[np.int8]  # (rows, time) 0: context; 1 to 4: that ending; -1: padding
    targets: npt.NDArray[np.int64]  # (rows, time, 4) the token of each ending that follows here,
    scored: npt.NDArray[np.bool_]  # (rows, time, 4) where there is one


def _lay_out(items: Sequence[Item]) -> _Batch:
    longest = max(map(row_length, items))
    shape = len(items), -(-longest // _TIME_MULTIPLE) * _TIME_MULTIPLE
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    branches = np.full(shape, -1, np.int8)
    targets, scored = np.zeros((*shape, ENDINGS), np.int64), np.zeros((*shape, ENDINGS), np.bool_)
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
            targets[row, start - 1, number], targets[row, own, number] = ending[0], ending[1:]
            scored[row, start - 1, number] = scored[row, own, number] = True
            end = own.stop
    return _Batch(tokens, positions, branches, targets, scored)


def _score_batch(model: GPT2, items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each ending the log-likelihood and the square of its rounding, (items, 4) fp64 on the model's device."""
    batch = _lay_out(items)
    places = np.flatnonzero(batch.scored.any(axis=2))
    device = model.wte.weight.device
    tokens, positions, branches, targets, scored, predicting = (
        torch.from_numpy(array).to(device)
        for array in (batch.tokens, batch.positions, batch.branches, batch.targets, batch.scored, places)
    )
    others, own = branches[:, None, :], branches[:, :, None]
    seen = ((others == 0) | (others == own)).tril()
    hidden = model.hidden(tokens, positions, seen[:, None])
    found = _token_scores(model, hidden.flatten(0, 1)[predicting], targets.flatten(0, 1)[predicting])
    log_likelihoods, variances = (_sums(values.double(), predicting, scored) for values in found)
    return log_likelihoods, variances


def _token_scores(model: GPT2, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods and their variances, both (tokens, 4) fp32, of ``targets`` (tokens, 4) after ``hidden``.

    The logits of the whole vocabulary exist for one chunk of tokens at a time.
    """
    head = model.wte.weight
    lengths = torch.linalg.vector_norm(head, dim=1, dtype=torch.float32)
    log_likelihoods, variances = [], []
    size = chunk_tokens(head.shape[0], hidden.device)
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = part @ head.t()  # (chunk, padded vocabulary)
        logits[:, VOCABULARY:] = -torch.inf
        log_likelihood = _log_softmax(logits, target)
        spread = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float32) * lengths[target]
        log_likelihoods.append(log_likelihood)
        variances.append(_variance(model.shape, spread, logits.gather(1, target).float(), log_likelihood, part.dtype))
    return torch.cat(log_likelihoods), torch.cat(variances)


def _log_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods (tokens, 4), fp32, of ``targets`` (tokens, 4)."""
    rows = rows_at_once(len(logits), logits.device)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.log_softmax(part, dim=1, dtype=torch.float32).gather(1, target) for part, target in parts])


def _variance(
    shape: ModelShape, spread: torch.Tensor, logit: torch.Tensor, log_likelihood: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """How far rounding may move a log-likelihood, squared; all (tokens, 4).

    Each layer rounds the hidden state twice and the last norm once more. A rounding shifts each part of it on its
    own, and so a logit by some epsilon x |hidden| x |row of the head| / sqrt(width), where ``spread`` is the product
    of the two lengths. The logit is rounded in turn, and so are, in fp32, the few steps of its log-softmax.
    """
    of_hidden = (2 * shape.layers + 1) * spread**2 / shape.width
    of_softmax = (4 * torch.finfo(torch.float32).eps * log_likelihood) ** 2
    return torch.finfo(dtype).eps ** 2 * (of_hidden + logit**2) + of_softmax


def _sums(values: torch.Tensor, places: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` (tokens, 4), which belong to flat ``places`` (tokens,), where ``scored`` (rows, time, 4)."""
    table = values.new_zeros(scored.shape)
    table.view(-1, ENDINGS)[places] = values
    return (table * scored).sum(dim=1)


def _lengths(items: Sequence[Item]) -> Array:
    """The divisors (measures, items, 4) of ``MEASURES``: 1, tokens, bytes and characters."""
    tokens = [[len(ending) for ending in item.endings] for item in items]
    return np.array(
        [np.ones((len(items), ENDINGS)), tokens, [item.bytes for item in items], [item.characters for item in items]],
        np.float64,
    )
