"""How good a model is: its loss on held-out windows and its answers to HellaSwag, and how far chance moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.data.dataset import Windows
from ds_gpt2.data.hellaswag import Item
from ds_gpt2.data.loader import on_device, with_targets
from ds_gpt2.evaluation.hellaswag_scoring import score
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.loss import cross_entropy
from ds_gpt2.model.shape import VOCABULARY

# Tokens that go through the model at once: enough for full matrix products, and on a GPU little beside the weights.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_ITEMS_AT_ONCE = 500  # so that progress shows; enough to find rows of like length among them

Array = npt.NDArray[np.float64]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Estimate:
    """A mean over windows or items."""

    value: float
    stderr: float | None  # its standard error; None where one window or item does not tell


def count_windows(windows: Windows, tokens: int) -> int:
    """How many windows make ``tokens`` tokens: whole ones, at least one, at most all. As validation in training."""
    return max(1, min(tokens // windows.sequence_length, len(windows)))


@torch.no_grad()
def window_losses(model: GPT2, windows: Windows, count: int, progress: Progress = lambda done: None) -> Array:
    """Cross entropy in nats, (count,), of each of the first ``count`` windows, the mean over its tokens.

    All windows are equally long: the mean of the result is the mean over tokens that training calls validation loss.

    Args:
        model: in eval mode; its context is at least as long as a window.
        progress: called with the number of windows done since the last call.

    Raises:
        UserError: a shard cannot be read, or holds what is no token.
    """
    head = model.wte.weight
    at_once = max(1, _BATCH_TOKENS.get(head.device.type, _BATCH_TOKENS["cuda"]) // windows.sequence_length)
    losses = []
    for start in range(0, count, at_once):
        indices = np.arange(start, min(start + at_once, count))
        tokens, targets = with_targets(on_device(windows.read(indices), head.device))
        rows = zip(model.hidden(tokens), targets, strict=True)
        losses += [cross_entropy(hidden, head, target, VOCABULARY) for hidden, target in rows]
        progress(len(indices))
    return torch.stack(losses).double().cpu().numpy()


def right_answers(model: GPT2, items: Sequence[Item], progress: Progress = lambda done: None) -> npt.NDArray[np.bool_]:
    """Which items the model answers right by each of ``hellaswag_scoring.MEASURES``, (measures, items).

    Args:
        model: in eval mode.
        items: at least one.
        progress: called with the number of items done since the last call.
    """
    parts = []
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        some = items[start : start + _ITEMS_AT_ONCE]
        scores = score(model, some)
        parts.append(scores.answers() == scores.labels)
        progress(len(some))
    return np.concatenate(parts, axis=1)


def mean(values: Array) -> Estimate:
    """The mean of ``values`` (n,), with s / sqrt(n), where s is their sample standard deviation."""
    count = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None)


def share(right: npt.NDArray[np.bool_]) -> Estimate:
    """The share p of True in ``right`` (n,), with sqrt(p (1 - p) / n)."""
    part = float(right.mean())
    return Estimate(part, math.sqrt(part * (1 - part) / len(right)))


def difference(values: Array | npt.NDArray[np.bool_], base: Array | npt.NDArray[np.bool_]) -> Estimate:
    """The mean of ``values - base``, both (n,) and of the same windows or items.

    Its error is that of the differences: what makes a window hard for both models is in neither.
    """
    return mean(values.astype(np.float64) - base.astype(np.float64))


def perplexity(loss: float) -> float:
    """The number of equally likely tokens that a loss in nats amounts to; inf where that is no float, NaN for NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
