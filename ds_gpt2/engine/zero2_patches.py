"""What is done otherwise than in DeepSpeed's ZeRO optimizer: how gradients are summed, and how their norm is found.

Both replace methods of one optimizer object that are not public; tests/engine/test_engine.py checks that they are
called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from ds_gpt2.common.errors import UserError
from ds_gpt2.distributed import collectives

_BLOCK = 4096  # squares that are added up in fp32 on a CPU: as fast as one fp32 sum, and off by about 1e-9


def sum_gradients_in_fp32(model: nn.Module, optimizer: Any) -> None:
    """Have micro-batches' gradients added up in fp32, on each rank, and reduced over ranks as they are.

    DeepSpeed's ``coalesce_grad_reduction`` reduces once a step, but what it reduces is summed in the weights' bf16,
    where a small gradient vanishes beside a large one. PyTorch adds into a gradient of the dtype that it is told.
    """
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    _replace(optimizer, "_gradient_reduction_buffer_dtype", lambda: torch.float32)


def read_norm_at_once(optimizer: Any) -> None:
    """Have the gradients' norm computed by few kernels, and read once, instead of by some ten for each parameter.

    A norm that is Inf or NaN tells of a gradient that is, or of one beyond 1e19, whose square is: no need to look for
    that on its own.
    """
    norms: list[torch.Tensor] = []

    def has_overflow(partition_gradients: bool = True) -> bool:
        norms[:] = [_global_norm(optimizer)]
        return not math.isfinite(norms[0])

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        return norms.pop() if norms else _global_norm(optimizer)

    _replace(optimizer, "has_overflow", has_overflow)
    _replace(optimizer, "scaled_global_norm", scaled_global_norm)


def _replace(optimizer: Any, name: str, method: Callable[..., object]) -> None:
    """
    Raises:
        UserError: there is no such method, so nothing would ask for this one.
    """
    if not callable(getattr(optimizer, name, None)):
        version = metadata.version("deepspeed")
        raise UserError(f"DeepSpeed {version} has no {name} where 0.19.8 has it: pip install deepspeed==0.19.8")
    setattr(optimizer, name, method)


def _global_norm(optimizer: Any) -> torch.Tensor:
    """Of all ranks' gradients, before clipping: scalar on the CPU."""
    parts = [part for group in optimizer.averaged_gradients.values() for part in group]
    if parts[0].device.type == "cpu":
        total = torch.stack([_sum_of_squares(part) for part in parts]).sum()
    else:
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, torch.float32))).square()
    return collectives.sum_over_ranks(total).sqrt().cpu()


def _sum_of_squares(part: torch.Tensor) -> torch.Tensor:
    """fp64 scalar, from fp32 sums of a few thousand squares each.

    One fp32 sum of millions of squares depends on how the gradients are partitioned (its fourth digit on a CPU), so
    that the norm, and what is clipped, would depend on the number of ranks. fp64 throughout takes nine times as long.
    """
    part = part.flatten()
    whole = len(part) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(part[:whole].view(-1, _BLOCK), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(part[whole:]).double().square()
