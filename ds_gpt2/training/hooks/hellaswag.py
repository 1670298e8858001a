"""HellaSwag during training: the share of items whose correct ending, of four, the model finds most likely."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch

from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import HellaswagSettings
from ds_gpt2.data.hellaswag import SHA256, URL, fetch, load_items
from ds_gpt2.data.items import Item
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.eval_mode import eval_mode
from ds_gpt2.evaluation.loss import share_stderr
from ds_gpt2.evaluation.row_batches import row_length
from ds_gpt2.evaluation.scoring import MEASURES, score
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook, on_all_ranks
from ds_gpt2.training.hooks.items import load_on_all_ranks, log_truncation

log = logging.getLogger(__name__)


class HellaSwag(Hook):
    """Accuracy on HellaSwag's validation items. With the same weights, it does not depend on the number of ranks.

    The answer is the ending with the largest log-likelihood. Four measures divide it differently: ``acc`` by nothing,
    ``acc_norm`` by tokens (what llm.c and build-nanogpt report), ``acc_norm_bytes`` by UTF-8 bytes,
    ``acc_norm_chars`` by characters. What lm-evaluation-harness 0.4.13 calls ``acc_norm`` divides by ``len(ending)``:
    that is ``acc_norm_chars`` on text that is ``cleaned``. Bytes are more than characters in 181 items.
    """

    name = "HellaSwag accuracy"

    def __init__(self, settings: HellaswagSettings, items: list[Item]) -> None:
        """
        Args:
            items: at least one; all are used.
        """
        self.every = Every(settings.every)
        self._items = len(items)
        self._mine = items_of_rank(items, collectives.rank(), collectives.world_size())

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        start = time.monotonic()
        counts = on_all_ranks(lambda: self._count_correct(engine))
        correct = collectives.sum_over_ranks(counts).tolist()
        metrics: StepMetrics = {}
        for measure, count in zip(MEASURES, correct, strict=True):
            accuracy = count / self._items
            metrics[f"hellaswag/{measure}"] = accuracy
            metrics[f"hellaswag/{measure}_stderr"] = share_stderr(accuracy, self._items)
        accuracies = ", ".join(f"{measure} {metrics[f'hellaswag/{measure}']:.4f}" for measure in MEASURES)
        seconds = time.monotonic() - start
        log.info(f"step {state.step:,}: HellaSwag {accuracies} ({self._items:,} items, {seconds:.1f} s)")
        return metrics

    def _count_correct(self, engine: Engine) -> torch.Tensor:
        """Return the number of correct answers of this rank's items by each measure, (measures,) fp64."""
        counts = np.zeros(len(MEASURES))
        if self._mine:
            with eval_mode(engine.model):
                counts[:] = score(engine.model, self._mine, self.progress).correct()
        return torch.from_numpy(counts).to(engine.device)


def open_hellaswag(settings: HellaswagSettings, model: GPT2, cache_dir: Path) -> HellaSwag | None:
    """Return the hook; None, with a warning, if there are no items or not the same ones on all ranks.

    Every rank calls this. The file is downloaded if it does not exist.
    """
    items = load_on_all_ranks(
        "HellaSwag",
        settings.path,
        lambda: load_items(settings.path, settings.text, cache_dir),
        lambda: _provide(settings.path),
    )
    if items is None:
        return None
    used = items[: settings.items]
    log_truncation("HellaSwag", used, model)
    return HellaSwag(settings, used)


def _provide(path: Path) -> None:
    if not path.exists():
        log.info(f"downloading HellaSwag to {path} ...")
        fetch(path, URL, SHA256)


def items_of_rank(items: list[Item], rank: int, world_size: int) -> list[Item]:
    """Return a rank's items: every ``world_size``-th one, in the order of their rows' lengths."""
    order = np.argsort([row_length(item) for item in items], kind="stable")
    return [items[number] for number in order[rank::world_size]]
