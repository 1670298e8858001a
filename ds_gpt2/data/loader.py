"""The windows of each rank in each batch: a pure function of (seed, batch, rank, world size)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.data.dataset import Windows
from ds_gpt2.data.mixture import Mixture
from ds_gpt2.data.prefetch import Prefetcher
from ds_gpt2.data.shards import token_problem

MicroBatch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, (micro_batch, sequence_length) int64


class TrainingData:
    """Training windows in the order of a mixture; of a single dataset in shuffled order, each exactly once per epoch.

    The last step of an epoch is completed with windows of the next epoch.
    """

    def __init__(
        self,
        windows: Windows,
        plan: BatchPlan,
        rank: int,
        seed: int,
        device: torch.device,
        mixture: Mixture | None = None,
    ) -> None:
        """
        Args:
            mixture: the order of the windows; None: all of them in shuffled order.
        """
        self.windows = windows
        self.plan = plan
        self._rank = rank
        self._mixture = mixture if mixture is not None else Mixture.of_one(len(windows), seed)
        self._device = device
        self.problem: str | None = None  # why this rank could not read its windows
        self._prefetcher = Prefetcher(self._read)
        self._order = functools.lru_cache(maxsize=4)(self._permuted)  # used before and after a step

    def micro_batches(self, batch: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of ``batch`` (1-based, one per step), on its device.

        If they cannot be read, ``problem`` is set and micro-batches of zeros are yielded: the other ranks already
        compute, and this one must take part until all ranks agree to drop the step.
        """
        try:
            micro_batches = self._prefetcher.get(batch)
        except UserError as error:
            self.problem = str(error)
            windows = self.plan.windows_per_step // self.plan.world_size
            micro_batches = self._split(np.zeros((windows, self.plan.sequence_length + 1), np.int64))
        yield from micro_batches

    def _read(self, batch: int) -> list[MicroBatch]:
        mine = np.split(self.windows_of(batch), self.plan.world_size)[self._rank]
        return self._split(self.windows.read(mine))

    def _split(self, rows: npt.NDArray[np.int64]) -> list[MicroBatch]:
        return [with_targets(part) for part in on_device(rows, self._device).split(self.plan.micro_batch)]

    def windows_of(self, batch: int) -> npt.NDArray[np.int64]:
        """Return the window indices of ``batch`` (1-based) over all ranks, (windows_per_step,) int64.

        They are in rank order and the same for every world size. The array is cached and must not be modified.
        """
        return self._order(batch)

    def _permuted(self, batch: int) -> npt.NDArray[np.int64]:
        size = self.plan.windows_per_step
        return self._mixture.windows_at(np.arange((batch - 1) * size, batch * size, dtype=np.int64))

    def epoch(self, batch: int) -> float:
        """Return the number of epochs completed after ``batch``: as many windows as all sources have, each time."""
        return batch * self.plan.windows_per_step / len(self.windows)

    def source_metrics(self, batch: int) -> dict[str, float]:
        """Return the tokens and epochs of each source of a mixture after ``batch``, by metric name."""
        mixture, position = self._mixture, batch * self.plan.windows_per_step
        if not mixture.names:
            return {}
        tokens, epochs = mixture.used_before(position) * self.plan.sequence_length, mixture.epochs_before(position)
        metrics: dict[str, float] = {}
        for source, name in enumerate(mixture.names):
            metrics |= {f"data/{name}/tokens": int(tokens[source]), f"data/{name}/epoch": float(epochs[source])}
        return metrics


def on_device(rows: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy window rows (n, sequence_length + 1) int64 to ``device``; the copy to a GPU is asynchronous.

    Raises:
        UserError: a token id is outside GPT-2's vocabulary.
    """
    if (problem := token_problem(int(rows.max()))) is not None:
        raise UserError(f"a window of the data {problem}; find its shard with ./launch.sh verify")
    tensor = torch.from_numpy(rows)
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a new thread's current device is GPU 0
        return tensor.pin_memory().to(device, non_blocking=True)


def with_targets(rows: torch.Tensor) -> MicroBatch:
    """Split window rows (n, sequence_length + 1) into tokens and targets, both views (n, sequence_length)."""
    return rows[:, :-1], rows[:, 1:]
