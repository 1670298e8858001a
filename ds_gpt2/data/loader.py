"""Which windows a rank computes of a batch: a pure function of (seed, number of the batch, rank, world size)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.data.dataset import Windows
from ds_gpt2.data.prefetch import Ahead
from ds_gpt2.data.shuffle import permute
from ds_gpt2.model.shape import VOCABULARY

MicroBatch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, (micro_batch, sequence_length) int64


class TrainingData:
    """Training windows in their order: each exactly once an epoch; the last step of an epoch borrows from the next."""

    def __init__(self, windows: Windows, plan: BatchPlan, rank: int, seed: int, device: torch.device) -> None:
        self.windows = windows
        self.plan = plan
        self._rank = rank
        self._seed = seed
        self._device = device
        self.problem: str | None = None  # why this rank has not read what it was asked for
        self._ahead = Ahead(self._read)
        self._order = functools.lru_cache(maxsize=4)(self._permuted)  # asked for before a step and after it

    def micro_batches(self, batch: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``batch`` (1-based, one a step), on its device.

        Where they cannot be read, ``problem`` says why, and others take their place: the other ranks compute already,
        and this one has to take part until all can agree to drop the step.
        """
        try:
            made = self._ahead.take(batch)
        except UserError as error:
            self.problem = str(error)
            windows = self.plan.windows_per_step // self.plan.world_size
            made = self._split(np.zeros((windows, self.plan.sequence_length + 1), np.int64))
        yield from made

    def _read(self, batch: int) -> list[MicroBatch]:
        mine = np.split(self.windows_of(batch), self.plan.world_size)[self._rank]
        return self._split(self.windows.read(mine))

    def _split(self, rows: npt.NDArray[np.int64]) -> list[MicroBatch]:
        return [with_targets(some) for some in on_device(rows, self._device).split(self.plan.micro_batch)]

    def windows_of(self, batch: int) -> npt.NDArray[np.int64]:
        """The windows of ``batch`` over all ranks, in rank order: the same for every world size. Not to be changed."""
        return self._order(batch)

    def _permuted(self, batch: int) -> npt.NDArray[np.int64]:
        size = self.plan.windows_per_step
        positions = np.arange((batch - 1) * size, batch * size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, len(self.windows))
        return np.concatenate(
            [
                permute(offsets[epochs == epoch], len(self.windows), self._seed, int(epoch))
                for epoch in np.unique(epochs)
            ]
        )

    def epoch(self, batch: int) -> float:
        """Epochs done with ``batch``."""
        return batch * self.plan.windows_per_step / len(self.windows)

    def steps_for(self, epochs: float) -> int:
        """Steps until ``epochs`` epochs are done, the last one filled up from the next epoch."""
        return self.plan.steps_for(epochs, len(self.windows))


def on_device(rows: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Window rows (n, sequence_length + 1) on ``device``, which may compute meanwhile.

    Raises:
        UserError: a token id that GPT-2's vocabulary does not have.
    """
    if int(rows.max()) >= VOCABULARY:
        raise UserError(f"token id {int(rows.max())} is out of GPT-2's range (0 to {VOCABULARY - 1}): check the shards")
    tensor = torch.from_numpy(rows)
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a thread begins with GPU 0
        return tensor.pin_memory().to(device, non_blocking=True)


def with_targets(rows: torch.Tensor) -> MicroBatch:
    """Window rows as tokens, and the targets one place later."""
    return rows[:, :-1], rows[:, 1:]
