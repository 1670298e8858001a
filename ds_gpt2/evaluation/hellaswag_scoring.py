"""Score HellaSwag: the log-likelihood of every ending, by a reference implementation and by a faster batched one.

The batched implementation computes an item's context once. A row holds the context followed by the four endings. The
positions of each ending continue those of the context, and it attends to the context and to itself only. Rows of
similar length form a batch, and the output head is applied only at positions that predict a token of an ending.
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

# Tokens of a batch: on a CPU enough for efficient matrix products, on a GPU for few kernel launches, and far fewer than
# a micro-batch of training has.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_SHORTEST_SHARE = 0.9  # length of a batch's shortest row, at least, as a share of its longest
_TIME_MULTIPLE = 8  # attention kernels require that the length of a masked row is a multiple of this

# Two endings count as tied if their sums differ by less than ``CLOSE`` times the root of the sum of their squared
# ``rounding``. Tied items are scored again by the reference. On CPUs, the difference of two sums deviated from the
# reference by at most 0.66 of that root, and by 0.03 to 0.14 of it in the root mean square (7 M and 124 M parameters in
# bf16, 7 M in fp32; random, scaled-up and trained weights; benchmarks/results/hellaswag_cpu.json). In bf16 3 to 9 % of
# the items were scored again, in fp32 none.
CLOSE = 1.0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scores of a model on HellaSwag items."""

    sums: Array  # (items, 4) log-likelihood of each ending, nats
    rounding: Array  # (items, 4) scale of the rounding error of a sum, nats; see ``CLOSE``
    lengths: Array  # (measures, items, 4) the divisor of a sum for each of ``MEASURES``
    labels: npt.NDArray[np.int64]  # (items,) index of the correct ending

    def answers(self) -> npt.NDArray[np.int64]:
        """Return the index of the chosen ending, (measures, items); the first one of a tie."""
        return (self.sums / self.lengths).argmax(axis=2)

    def correct(self) -> npt.NDArray[np.int64]:
        """Return the number of correct answers, (measures,)."""
        return (self.answers() == self.labels).sum(axis=1)

    def close(self) -> npt.NDArray[np.bool_]:
        """Return a mask (items,) of the items whose two best endings are tied within rounding, by any measure."""
        values, error = self.sums / self.lengths, CLOSE * self.rounding / self.lengths
        best = self.answers()[..., None]
        gaps = np.take_along_axis(values, best, axis=2) - values
        tied = gaps <= np.hypot(np.take_along_axis(error, best, axis=2), error)
        return (tied.sum(axis=2) > 1).any(axis=0)  # the best ending is always tied with itself


def score(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """Return the scores of ``items``. Every answer equals that of ``score_one``; it does not depend on the other items.

    Args:
        model: in eval mode. The contexts of items that are too long for it are truncated at the start.
        items: at least one.
        progress: called after each batch and after each item that is scored again.
    """
    scores = score_batched(model, items, progress)
    sums = scores.sums.copy()
    for number in np.flatnonzero(scores.close()).tolist():
        sums[number] = score_one(model, items[number])
        progress()
    return replace(scores, sums=sums)


@torch.no_grad()
def score_one(model: GPT2, item: Item) -> Array:
    """Return the log-likelihoods (4,) of the endings of one item, nats: the reference implementation.

    It evaluates four rows of context and ending, as build-nanogpt's hellaswag.py does.

    Args:
        model: in eval mode.
    """
    item = truncate(item, model.shape.sequence_length)
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
    ending_losses = losses.view(ENDINGS, -1).cpu().double().numpy() * scored[:, 1:]
    return -ending_losses.sum(axis=1)


@torch.no_grad()
def score_batched(model: GPT2, items: Sequence[Item], progress: Callable[[], None] = lambda: None) -> Scores:
    """Return the scores of ``items`` by the batched implementation alone; arguments as for ``score``."""
    device = model.wte.weight.device
    truncated = [truncate(item, model.shape.sequence_length) for item in items]
    batches = make_batches(truncated, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"]))
    results = []
    for batch in batches:
        results.append(_score_batch(model, [truncated[number] for number in batch]))
        progress()
    sums, variances = (torch.cat(parts).cpu().numpy() for parts in zip(*results, strict=True))
    input_order = np.argsort(np.concatenate(batches))
    labels = np.array([item.label for item in items])
    return Scores(sums[input_order], np.sqrt(variances[input_order]), _lengths(truncated), labels)


def truncate(item: Item, sequence_length: int) -> Item:
    """Return ``item`` with its context and endings cut to what a model of this sequence length can process.

    The context is cut at the start until it fits together with the longest ending; at least one token of it remains.
    Endings longer than ``sequence_length`` are cut at the end.
    """
    endings = [ending[:sequence_length] for ending in item.endings]
    context_length = sequence_length - (max(map(len, endings)) - 1)  # an ending's last token is no input
    return replace(item, context=item.context[-context_length:], endings=endings)


def row_length(item: Item) -> int:
    """Return the tokens in the row of an item: the context, and all but the last token of each ending."""
    return len(item.context) + sum(len(ending) - 1 for ending in item.endings)


def make_batches(items: Sequence[Item], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Return the indices of the items of each batch, longest rows first.

    The rows of a batch are of similar length, which limits padding. A batch has at most ``tokens`` tokens, padding
    included; a longer row forms a batch alone.
    """
    lengths = np.array([row_length(item) for item in items])
    order = np.argsort(-lengths, kind="stable")
    batches = []
    while len(order):
        longest = int(lengths[order[0]])
        similar = int((lengths[order] >= _SHORTEST_SHARE * longest).sum())
        size = max(1, min(similar, tokens // longest))
        batches.append(order[:size])
        order = order[size:]
    return batches


@dataclass(frozen=True)
class _Batch:
    """Rows padded to one length; a row is the context and all but the last token of each ending."""

    tokens: npt.NDArray[np.int64]  # (rows, time)
    positions: npt.NDArray[np.int64]  # (rows, time)
    branches: npt.NDArray[np.int8]  # (rows, time) 0: context; 1 to 4: that ending; -1: padding
    targets: npt.NDArray[np.int64]  # (rows, time, 4) the next token of each ending after this position
    scored: npt.NDArray[np.bool_]  # (rows, time, 4) whether there is such a token


def _collate(items: Sequence[Item]) -> _Batch:
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
    """Return the log-likelihood and the squared rounding of each ending, both (items, 4) fp64 on the model's device."""
    batch = _collate(items)
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
    log_likelihoods, variances = (_sums(values.double(), predicting, scored) for values in found)
    return log_likelihoods, variances


def _token_scores(model: GPT2, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-likelihoods and their variances, both (tokens, 4) fp32, of ``targets`` (tokens, 4).

    ``hidden`` is (tokens, width). The logits of the whole vocabulary exist for one chunk of tokens at a time.
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
    """Return the log-likelihoods (tokens, 4), fp32, of ``targets`` (tokens, 4)."""
    rows = rows_at_once(len(logits), logits.device)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.log_softmax(part, dim=1, dtype=torch.float32).gather(1, target) for part, target in parts])


def _variance(
    shape: ModelShape, spread: torch.Tensor, logit: torch.Tensor, log_likelihood: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the estimated variance of the rounding error of a log-likelihood; all tensors are (tokens, 4).

    Each layer rounds the hidden state twice, and the final norm rounds it once. A rounding changes each component
    independently, and so a logit by about epsilon x |hidden| x |row of the head| / sqrt(width); ``spread`` is the
    product of the two norms. The logit itself is rounded too, and so are, in fp32, the operations of its log-softmax.
    """
    of_hidden = (2 * shape.layers + 1) * spread**2 / shape.width
    of_softmax = (4 * torch.finfo(torch.float32).eps * log_likelihood) ** 2
    return torch.finfo(dtype).eps ** 2 * (of_hidden + logit**2) + of_softmax


def _sums(values: torch.Tensor, indices: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the sums (rows, 4) of ``values`` (tokens, 4) over the positions where ``scored`` (rows, time, 4) is True.

    ``indices`` (tokens,) are the flat positions of ``values``.
    """
    table = values.new_zeros(scored.shape)
    table.view(-1, ENDINGS)[indices] = values
    return (table * scored).sum(dim=1)


def _lengths(items: Sequence[Item]) -> Array:
    """Return the divisors (measures, items, 4) of ``MEASURES``: 1, tokens, bytes and characters."""
    tokens = [[len(ending) for ending in item.endings] for item in items]
    return np.array(
        [np.ones((len(items), ENDINGS)), tokens, [item.bytes for item in items], [item.characters for item in items]],
        np.float64,
    )
