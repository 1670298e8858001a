"""The data of a run: one dataset, or several as the sources of a mixture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.sections import MIXTURE_PERIOD, DataSettings
from ds_gpt2.data.dataset import Dataset, Split, Windows, count_windows_of, log, open_dataset
from ds_gpt2.data.mixture import Mixture, Stage, shares_of


@dataclass(frozen=True)
class HeldOut:
    """The validation windows of one source."""

    windows: Windows
    name: str | None = None  # of the source of a mixture; None: of a single dataset
    share: float = 1.0  # of its loss in the validation loss: that of the first stage
    size: float = 1.0  # share of the validation tokens


@dataclass(frozen=True)
class Sources:
    """The datasets of a run, in the order in which its windows are numbered, and their shares."""

    datasets: tuple[Dataset, ...]
    names: tuple[str, ...] = ()  # of the sources of a mixture; empty for a single dataset
    stages: tuple[tuple[int, tuple[int, ...]], ...] = ((1, (MIXTURE_PERIOD,)),)  # first step, share of each source
    limits: tuple[float | None, ...] = (None,)  # the most passes over each source

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the data of any source, see ``Dataset.fingerprint``."""
        if not self.names:
            return self.datasets[0].fingerprint
        content = json.dumps([self.names, [dataset.fingerprint for dataset in self.datasets]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def stage_identities(self) -> list[dict[str, Any]]:
        """What must not change of each stage of a mixture once it has begun: the first step, and shares by dataset."""
        return [
            {
                "from_step": step,
                "shares": [
                    [dataset.fingerprint, share] for dataset, share in zip(self.datasets, shares, strict=True) if share
                ],
            }
            for step, shares in self.stages
        ]

    def count(self, split: Split, sequence_length: int) -> int:
        """Return the number of windows of a split in all sources.

        Raises:
            UserError: a source has none.
        """
        return sum(count_windows_of(dataset, split, sequence_length) for dataset in self.datasets)

    def windows(
        self,
        split: Split,
        sequence_length: int,
        warn: Callable[[str], None] = log.warning,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Windows:
        """Return the windows of a split of all sources, see ``Windows``.

        Raises:
            UserError: a source has none.
        """
        return Windows(self.datasets, split, sequence_length, warn, stopped)

    def held_out(self, sequence_length: int, warn: Callable[[str], None], stopped: Callable[[], bool]) -> list[HeldOut]:
        """Return the validation windows of each source.

        A source that only later stages use counts for no part of the validation loss; its own loss is measured on
        an equal part of the tokens.

        Raises:
            UserError: a source has no validation window.
        """
        windows = [Windows(dataset, "val", sequence_length, warn, stopped) for dataset in self.datasets]
        if not self.names:
            return [HeldOut(windows[0])]
        shares = [share / MIXTURE_PERIOD for share in self.stages[0][1]]
        parts = zip(self.names, windows, shares, strict=True)
        return [HeldOut(own, name, share, share or 1 / len(windows)) for name, own, share in parts]

    def mixture(self, sequence_length: int, windows_per_step: int, seed: int) -> Mixture:
        """Return the order of the training windows.

        Raises:
            UserError: a source has no training window.
        """
        counts = [count_windows_of(dataset, "train", sequence_length) for dataset in self.datasets]
        stages = [Stage((step - 1) * windows_per_step, shares) for step, shares in self.stages]
        return Mixture(counts, stages, seed, self.names)

    def check_limits(self, sequence_length: int, windows_per_step: int, steps: int) -> None:
        """Check that a run of ``steps`` steps makes no more passes over any source than allowed.

        Raises:
            UserError: it would.
        """
        if all(limit is None for limit in self.limits):
            return
        passes = self.mixture(sequence_length, windows_per_step, seed=0).epochs_before(steps * windows_per_step)
        for name, limit, needed in zip(self.names, self.limits, passes.tolist(), strict=True):
            if limit is not None and needed > limit:
                raise UserError(
                    f"data.mixture: {steps:,} steps make {needed:.2f} passes over {name}, more than its epochs"
                    f" {limit:g}: lower its weight, train fewer steps, or raise its epochs"
                )

    def record_name(self, dataset: Dataset) -> str:
        """Return the name of the file, in the run's directory, that records which shards of a source are verified."""
        name = self.names[self.datasets.index(dataset)] if self.names else None
        return "data_checked.json" if name is None else f"data_checked_{name}.json"

    def with_first(self, dataset: Dataset) -> Sources:
        """Return the sources with another first dataset."""
        return replace(self, datasets=(dataset, *self.datasets[1:]))


def open_sources(settings: DataSettings) -> Sources:
    """Open the dataset of each source, see ``open_dataset``.

    Raises:
        UserError: see ``open_dataset``; the message names the directory.
    """
    sources = settings.sources
    datasets = tuple(open_dataset(source.dir) for source in sources)
    if settings.dir is not None:
        return Sources(datasets)
    names = tuple(source.label for source in sources)
    stages = []
    for step, mixture in zip([1, *(stage.from_step for stage in settings.stages)], settings.mixtures, strict=True):
        weights = {source.label: source.weight for source in mixture}
        stages.append((step, shares_of([weights.get(name, 0.0) for name in names])))
    return Sources(datasets, names, tuple(stages), tuple(_limit(settings, name) for name in names))


def missing_directories(settings: DataSettings) -> list[Path]:
    """Return the directories of the data that do not exist yet, or are empty."""
    directories = [source.dir for source in settings.sources]
    return [directory for directory in directories if not directory.is_dir() or not any(directory.iterdir())]


def _limit(settings: DataSettings, name: str) -> float | None:
    """Return the smallest limit of any stage."""
    entries = [source for mixture in settings.mixtures for source in mixture if source.label == name]
    return min((source.epochs for source in entries if source.epochs is not None), default=None)
