"""Replacements for two parts of DeepSpeed's ZeRO optimizer: the dtype of the gradients' sum, and their norm.

Both replace non-public methods of one optimizer object (see ``internals``); tests/engine/test_engine.py checks that
DeepSpeed calls the replacements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_gpt2.distributed import collectives

_BLOCK = 4096  # squares summed in fp32 on a CPU: as fast as one fp32 sum, relative error about 1e-9


def sum_gradients_in_fp32(model: nn.Module, optimizer: Any) -> None:
    """Accumulate the gradients of micro-batches in fp32 on each rank, and reduce them over ranks in fp32.

    DeepSpeed's ``coalesce_grad_reduction`` reduces once per step, but accumulates in the weights' bf16, where a small
    gradient vanishes beside a large one. PyTorch accumulates in ``parameter.grad_dtype``.
    """
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


class GradientCheck:
    """The check of the gradients before an update: DeepSpeed skips the update if their norm is not acceptable.

    The norm is computed with a few kernels and read once, instead of about ten kernels per parameter. The check for
    overflow needs no separate pass: the norm is Inf or NaN if a gradient is, or if one exceeds 1e19, the square of
    which is Inf in fp32.
    """

    def __init__(self, optimizer: Any) -> None:
        """Replace the check and the norm of ``optimizer``."""
        self.norm = math.nan  # of the newest gradients, over all ranks, before clipping
        self.accept: Callable[[float], bool] = lambda norm: True  # of a finite norm, the same on all ranks
        self._optimizer = optimizer
        self._computed: torch.Tensor | None = None
        optimizer.has_overflow = self._is_unacceptable
        optimizer.scaled_global_norm = self._take_norm

    def _is_unacceptable(self, partition_gradients: bool = True) -> bool:
        self._computed = _global_norm(self._optimizer)
        self.norm = float(self._computed)
        return not (math.isfinite(self.norm) and self.accept(self.norm))

    def _take_norm(self, norm_type: int = 2) -> torch.Tensor:
        norm, self._computed = self._computed, None
        return norm if norm is not None else _global_norm(self._optimizer)


def _global_norm(optimizer: Any) -> torch.Tensor:
    """Return the L2 norm of all ranks' gradients before clipping, a scalar on the CPU."""
    parts = [part for group in optimizer.averaged_gradients.values() for part in group]
    if parts[0].device.type == "cpu":
        total = torch.stack([_sum_of_squares(part) for part in parts]).sum()
    else:
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, torch.float32))).square()
    return collectives.sum_over_ranks(total).sqrt().cpu()


def _sum_of_squares(part: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, an fp64 scalar made of fp32 sums of ``_BLOCK`` squares each.

    One fp32 sum of millions of squares depends on how the gradients are partitioned (its fourth digit on a CPU), so
    the norm, and what is clipped, would depend on the number of ranks. fp64 throughout takes nine times as long.
    """
    part = part.flatten()
    whole = len(part) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(part[:whole].view(-1, _BLOCK), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(part[whole:]).double().square()
