"""Evaluations on items with several endings, or with a last word, during training."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ds_gpt2.common.formatting import counted
from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import EvaluationSettings
from ds_gpt2.data.evaluation_files import load_items, measures_of
from ds_gpt2.data.items import ItemList
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation import tasks
from ds_gpt2.evaluation.eval_mode import eval_mode
from ds_gpt2.evaluation.scoring import batches_of
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook, on_all_ranks
from ds_gpt2.training.hooks.items import load_on_all_ranks, log_truncation

log = logging.getLogger(__name__)


class TaskEvaluation(Hook):
    """One evaluation. With the same weights, its metrics are bitwise identical for any number of ranks.

    Batches do not depend on the number of ranks. Ranks take turns, and the results of all items are summed in one
    order. See ``evaluation.tasks`` for the measures.
    """

    def __init__(self, name: str, settings: EvaluationSettings, items: ItemList, model: GPT2) -> None:
        """
        Args:
            items: at least one; all are used.
        """
        self.every = Every(settings.every)
        self.name = f"evaluation {name}"
        self._task, self._measures = name, measures_of(name)
        self._items = items
        batches = batches_of(model, self._items)
        self._mine = tasks.batches_of_rank(batches, collectives.rank(), collectives.world_size())

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        start = time.monotonic()
        table = collectives.sum_over_ranks(on_all_ranks(lambda: self._results(engine))).cpu().numpy()
        metrics: StepMetrics = {}
        for measure, found in tasks.estimates(table, self._measures).items():
            metrics[f"eval/{self._task}/{measure}"] = found.value
            if found.stderr is not None:
                metrics[f"eval/{self._task}/{measure}_stderr"] = found.stderr
        shown = ", ".join(f"{measure} {metrics[f'eval/{self._task}/{measure}']:.4f}" for measure in self._measures)
        seconds = time.monotonic() - start
        log.info(f"step {state.step:,}: {self._task} {shown} ({counted(len(self._items), 'item')}, {seconds:.1f} s)")
        return metrics

    def _results(self, engine: Engine) -> torch.Tensor:
        """Return the results of this rank's items, (measures, items) fp64; zeros for the items of other ranks."""
        table = np.zeros((len(self._measures), len(self._items)))
        with eval_mode(engine.model):
            for batch in self._mine:
                items = [self._items[number] for number in batch]
                table[:, batch] = tasks.batch_results(engine.model, items, self._measures, self.progress)
        return torch.from_numpy(table).to(engine.device)


def open_evaluations(
    evaluations: Mapping[str, EvaluationSettings], model: GPT2, cache_dir: Path
) -> list[TaskEvaluation]:
    """Return the hooks of the evaluations with an interval. Every rank calls this.

    An evaluation without a valid file, or whose items are not the same on all ranks, is omitted, with a warning.

    Args:
        cache_dir: for tokens, if the directory of a file cannot be written to.
    """
    hooks = []
    for name, settings in evaluations.items():
        if settings.every and (items := _load(name, settings, cache_dir)) is not None:
            used = items if settings.items is None else ItemList(items[: settings.items])
            log_truncation(name, used, model)
            hooks.append(TaskEvaluation(name, settings, used, model))
    return hooks


def _load(name: str, settings: EvaluationSettings, cache_dir: Path) -> ItemList | None:
    return load_on_all_ranks(name, settings.path, lambda: load_items(settings.path, name, cache_dir))
