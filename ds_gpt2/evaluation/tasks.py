"""The results of a model on the items of an evaluation, and the metrics computed from them.

The measures are those of lm-evaluation-harness 0.4.13 (``ConfigurableTask.process_results`` in
``lm_eval/api/task.py``): ``acc`` is the share of items whose correct ending has the largest log-likelihood,
``acc_norm`` the same with log-likelihoods divided by the characters of the ending. Of last words, ``acc`` is the share
that greedy decoding generates, and ``perplexity`` is exp(-mean log-likelihood) of the words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ds_gpt2.data.items import Item
from ds_gpt2.evaluation.loss import Array, Estimate, mean, perplexity, share
from ds_gpt2.evaluation.scoring import MEASURES, batches_of, score
from ds_gpt2.model.gpt2 import GPT2

_SCORED_AS = {"acc": "acc", "acc_norm": "acc_norm_chars"}  # of ``scoring.MEASURES``


def results(model: GPT2, items: Sequence[Item], measures: Sequence[str], progress: Callable[[int], object]) -> Array:
    """Return the result of every item by each of ``measures``, (measures, items) fp64, see ``batch_results``.

    Args:
        model: in eval mode.
        progress: called with the number of items scored since the last call.
    """
    table = np.zeros((len(measures), len(items)))
    for batch in batches_of(model, items):
        table[:, batch] = batch_results(model, [items[number] for number in batch], measures)
        progress(len(batch))
    return table


def batch_results(
    model: GPT2, items: Sequence[Item], measures: Sequence[str], progress: Callable[[], None] = lambda: None
) -> Array:
    """Return the results of the items of one of ``scoring.batches_of``, (measures, items) fp64.

    A result of ``perplexity`` is a log-likelihood in nats, one of another measure 1 (correct) or 0.

    Args:
        progress: called after each forward pass.
    """
    scores = score(model, items, progress)
    if "perplexity" in measures:
        columns = {"acc": scores.greedy.astype(np.float64), "perplexity": scores.sums[:, 0]}
    else:
        right = (scores.answers() == scores.labels).astype(np.float64)
        columns = {name: right[MEASURES.index(own)] for name, own in _SCORED_AS.items()}
    return np.stack([columns[measure] for measure in measures])


def estimates(table: Array, measures: Sequence[str]) -> dict[str, Estimate]:
    """Return each measure of ``results`` with its standard error.

    That of a perplexity exp(-m) is exp(-m) times that of the mean m (delta method).
    """
    found = {}
    for measure, values in zip(measures, table, strict=True):
        if measure == "perplexity":
            of_log = mean(-values)
            value = perplexity(of_log.value)
            found[measure] = Estimate(value, None if of_log.stderr is None else value * of_log.stderr)
        else:
            found[measure] = share(values > 0)
    return found


def differences(table: Array, base: Array, measures: Sequence[str]) -> dict[str, Estimate]:
    """Return each share of correct answers minus that of ``base``, over the same items; not of the perplexity.

    The standard error is that of the paired differences.
    """
    shares = zip(measures, table, base, strict=True)
    return {measure: mean(values - of_base) for measure, values, of_base in shares if measure != "perplexity"}


def batches_of_rank(
    batches: Sequence[npt.NDArray[np.int64]], rank: int, world_size: int
) -> list[npt.NDArray[np.int64]]:
    """Return a rank's batches: every ``world_size``-th one; the longest rows are first."""
    return list(batches[rank::world_size])
