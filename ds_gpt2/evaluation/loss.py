"""Evaluate a model on held-out windows and HellaSwag items, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.data.dataset import Windows
from ds_gpt2.data.items import Item
from ds_gpt2.data.loader import on_device, with_targets
from ds_gpt2.data.token_bytes import count_bytes
from ds_gpt2.evaluation.scoring import score
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.loss import cross_entropy
from ds_gpt2.model.shape import VOCABULARY

# Tokens of a batch: enough for efficient matrix products; on a GPU their memory is small compared with the weights.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_ITEMS_PER_CALL = 500  # few enough to report progress, enough to form batches of rows of similar length

Array = npt.NDArray[np.float64]
Progress = Callable[[int], object]  # called with the number of windows or items done since the last call


@dataclass(frozen=True)
class Estimate:
    """A mean over windows or items."""

    value: float
    stderr: float | None  # standard error of the mean; None for a single window or item


def count_windows(windows: Windows, tokens: int) -> int:
    """Return how many whole windows fit into ``tokens`` tokens: at least one, at most all. Also used by training."""
    return max(1, min(tokens // windows.sequence_length, len(windows)))


def bytes_per_token(windows: Windows, count: int) -> float:
    """Return the mean of the UTF-8 bytes of the target tokens of the first ``count`` windows.

    Raises:
        UserError: a shard cannot be read.
    """
    size = max(1, _BATCH_TOKENS["cuda"] // windows.sequence_length)
    starts = range(0, count, size)
    total = sum(count_bytes(windows.read(np.arange(start, min(start + size, count)))) for start in starts)
    return total / (count * windows.sequence_length)


@torch.no_grad()
def window_losses(model: GPT2, windows: Windows, count: int, progress: Progress = lambda done: None) -> Array:
    """Return the mean cross entropy in nats of each of the first ``count`` windows, (count,) fp64.

    All windows have equal lengths, so the mean of the result is the mean over tokens: the validation loss of training,
    up to fp32 rounding, because training computes one loss for several windows.

    Args:
        model: in eval mode; its context is at least as long as a window.
        progress: called with the number of windows evaluated since the last call.

    Raises:
        UserError: a shard cannot be read, or has a token id outside GPT-2's vocabulary.
    """
    head = model.wte.weight
    batch_size = max(1, _BATCH_TOKENS.get(head.device.type, _BATCH_TOKENS["cuda"]) // windows.sequence_length)
    losses = []
    for start in range(0, count, batch_size):
        indices = np.arange(start, min(start + batch_size, count))
        tokens, targets = with_targets(on_device(windows.read(indices), head.device))
        rows = zip(model.hidden(tokens), targets, strict=True)
        losses += [cross_entropy(hidden, head, target, VOCABULARY) for hidden, target in rows]
        progress(len(indices))
    return torch.stack(losses).double().cpu().numpy()


def right_answers(model: GPT2, items: Sequence[Item], progress: Progress = lambda done: None) -> npt.NDArray[np.bool_]:
    """Return which items the model answers correctly by each of ``scoring.MEASURES``, (measures, items).

    Args:
        model: in eval mode.
        items: at least one.
        progress: called with the number of items scored since the last call.
    """
    parts = []
    for start in range(0, len(items), _ITEMS_PER_CALL):
        chunk = items[start : start + _ITEMS_PER_CALL]
        scores = score(model, chunk)
        parts.append(scores.answers() == scores.labels)
        progress(len(chunk))
    return np.concatenate(parts, axis=1)


def mean(values: Array) -> Estimate:
    """Return the mean of ``values`` (n,) and its standard error s / sqrt(n); s is the sample standard deviation."""
    count = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None)


def share(right: npt.NDArray[np.bool_]) -> Estimate:
    """Return the share p of True in ``right`` (n,) and its standard error."""
    p = float(right.mean())
    return Estimate(p, share_stderr(p, len(right)))


def share_stderr(p: float, count: int) -> float:
    """Return the standard error sqrt(p (1 - p) / n) of a share ``p`` of ``count`` items."""
    return math.sqrt(p * (1 - p) / count)


def difference(values: Array | npt.NDArray[np.bool_], base: Array | npt.NDArray[np.bool_]) -> Estimate:
    """Return the mean of ``values - base``, both (n,) over the same windows or items.

    The standard error is that of the paired differences, which do not contain the difficulty common to both models.
    """
    return mean(values.astype(np.float64) - base.astype(np.float64))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return the bits that a model needs for a byte of text, of a loss in nats per token."""
    return loss / math.log(2) / bytes_per_token


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats; inf where that overflows, NaN for NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
