"""An exponential moving average (EMA) of the fp32 master weights, partitioned over the ranks as the masters are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class WeightAverage:
    """This rank's part of the moving average: 4 bytes for each element of its partition.

    After each applied update, ``average = decay * average + (1 - decay) * master``, as in Kingma and Ba 2015 ("Adam"),
    section 7.2, and in ``torch.optim.swa_utils.get_ema_multi_avg_fn``. It starts as a copy of the weights, so it needs
    no correction of a bias towards 0.
    """

    def __init__(self, masters: Sequence[torch.Tensor], decay: float) -> None:
        """
        Args:
            masters: for each parameter group, this rank's part of the master weights, fp32, 1-D, padding included.
            decay: above 0 and below 1.
        """
        self.decay = decay
        self.parts = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[torch.Tensor]) -> None:
        """Include ``masters``, as they are after an update, in the average."""
        for part, master in zip(self.parts, masters, strict=True):
            part.lerp_(master, 1 - self.decay)  # part + (1 - decay) * (master - part), in place

    @torch.no_grad()
    def restart(self, masters: Sequence[torch.Tensor]) -> None:
        """Make the average equal to ``masters``."""
        for part, master in zip(self.parts, masters, strict=True):
            part.copy_(master)

    def to_save(self, saved_masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts without padding: as many elements as ``saved_masters``. They share their memory."""
        return [part[: len(saved)] for part, saved in zip(self.parts, saved_masters, strict=True)]

    @torch.no_grad()
    def load(self, saved: Sequence[torch.Tensor]) -> None:
        """Restore what ``to_save`` returned; the padding becomes 0, as that of the masters is."""
        for part, values in zip(self.parts, saved, strict=True):
            part[: len(values)] = values
            part[len(values) :] = 0.0


def set_model_weights(optimizer: Any, parts: Sequence[torch.Tensor]) -> None:
    """Set the model's weights, in its dtype, on all ranks. Every rank calls this.

    It is what DeepSpeed does at the end of each update (``update_lp_params``): each rank rounds its part into the
    model's flat tensors, then these are gathered in place. So the same parts always give the same bits, and no copy of
    the weights is needed.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer.
        parts: for each parameter group, this rank's part of the weights, fp32, 1-D, padding included.
    """
    masters = optimizer.single_partition_of_fp32_groups
    optimizer.single_partition_of_fp32_groups = parts
    try:
        optimizer.update_lp_params()
    finally:
        optimizer.single_partition_of_fp32_groups = masters
