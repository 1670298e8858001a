"""Fast bf16 matrix products on CPUs without bf16 instructions (x86 without AVX-512).

There, PyTorch's own bf16 product takes 10 to 59 times as long as multiplying tiles in fp32 and rounding the result
(benchmarks/LOG.md). Both accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_TILE = 1024  # length of a tile in the largest dimension: a few megabytes in fp32


def _lacks_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()


# Whether oneDNN, which PyTorch uses on CPUs, has no bf16 instructions on this processor.
BF16_IS_SLOW = _lacks_bf16()


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``a @ b + bias``, (m, n), of ``a`` (m, k), ``b`` (k, n) and ``bias`` (n,), all of one dtype.

    Not differentiable; see ``linear``.
    """
    if not _is_slow(a):
        return a @ b if bias is None else torch.addmm(bias, a, b)
    (m, k), n = a.shape, b.shape[1]
    start = torch.zeros(n, dtype=torch.float32, device=a.device) if bias is None else bias.float()
    if k >= max(m, n):
        total = start.expand(m, n).contiguous()
        for left, right in zip(a.split(_TILE, dim=1), b.split(_TILE), strict=True):
            total.addmm_(left.float(), right.float())
        return total.to(a.dtype)
    result = torch.empty(m, n, dtype=a.dtype, device=a.device)
    if m >= n:
        right = b.float()
        for rows, left in zip(result.split(_TILE), a.split(_TILE), strict=True):
            rows.copy_(torch.addmm(start, left.float(), right))
    else:
        left = a.float()
        tiles = zip(result.split(_TILE, dim=1), b.split(_TILE, dim=1), start.split(_TILE), strict=True)
        for columns, right, offset in tiles:
            columns.copy_(torch.addmm(offset, left, right.float()))
    return result


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``F.linear(x, weight, bias)``, differentiable: ``x`` (..., in), ``weight`` (out, in), ``bias`` (out,)."""
    return _tiled_linear(x, weight, bias) if _is_slow(x) else F.linear(x, weight, bias)


def _is_slow(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and BF16_IS_SLOW


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight).view_as(x) if needs_x else None,
            product(grad.t(), x.flatten(0, -2)) if needs_weight else None,
            grad.sum(0, dtype=torch.float32).to(grad.dtype) if needs_bias else None,
        )


# Excluded from compilation, which would replace it by PyTorch's own product.
_tiled_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_tiled_linear = torch.compiler.disable(_Linear.apply)
