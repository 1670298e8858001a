"""Cross entropy of a tied output head that never holds the logits of a whole micro-batch.

The logits of GPT-2 (50,304 columns) are by far the largest tensor of a step. Here they exist for one chunk of tokens at
a time: the forward pass turns each chunk into its loss and its part of the gradients, so that the backward pass neither
stores nor recomputes logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ds_gpt2.model.matmul import product

# Bytes of a chunk's logits in fp32. Small on a CPU, for its caches and because new memory is slow; large on a GPU,
# where few large matrix products are fast.
_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}
_ROWS = 8  # tokens per softmax on a CPU: 1.6 MB of GPT-2's logits in fp32


def cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, vocabulary: int, compiled: bool = False
) -> torch.Tensor:
    """Return the mean next-token cross entropy in nats, an fp32 scalar.

    Args:
        hidden: (tokens, width), the final hidden states, bf16 or fp32.
        head: (padded vocabulary, width), the tied output weights, same dtype. Rows from ``vocabulary`` on are padding
            with probability 0, so the loss equals that of the unpadded model.
        targets: (tokens,) int64.
        vocabulary: number of tokens without padding.
        compiled: let ``torch.compile`` fuse the passes over a chunk's logits.
    """
    chunk = chunk_tokens(head.shape[0], hidden.device)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    chunk_loss = _compiled() if compiled else _loss_by_passes
    return _ChunkedCrossEntropy.apply(hidden, head, targets, vocabulary, chunk, differentiate, chunk_loss)


def chunk_tokens(columns: int, device: torch.device) -> int:
    """Return the tokens of a chunk: the largest power of two whose fp32 logits fit the budget of the device type.

    Args:
        columns: of the logits, that is, the padded vocabulary.
    """
    fitting = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * columns)
    return max(1, 2 ** (fitting.bit_length() - 1)) if fitting else 1


def rows_at_once(tokens: int, device: torch.device) -> int:
    """Return how many of a chunk's ``tokens`` one softmax takes: on a CPU few, so that they stay in its caches."""
    return min(tokens, _ROWS) if device.type == "cpu" else tokens


# (logits, targets, vocabulary, differentiate) -> the sum of the losses, an fp32 scalar. If ``differentiate``, the
# logits (chunk, padded vocabulary) are overwritten by d(sum of losses)/d(logits) = softmax - one-hot.
_ChunkLoss = Callable[[torch.Tensor, torch.Tensor, int, bool], torch.Tensor]


def _loss_by_passes(logits: torch.Tensor, target: torch.Tensor, vocabulary: int, differentiate: bool) -> torch.Tensor:
    """Implement ``_ChunkLoss`` with eager operations."""
    size = rows_at_once(len(logits), logits.device)
    parts = zip(logits.split(size), target.split(size), strict=True)
    return torch.stack([_loss_of_rows(*part, vocabulary, differentiate) for part in parts]).sum()


def _loss_of_rows(logits: torch.Tensor, target: torch.Tensor, vocabulary: int, differentiate: bool) -> torch.Tensor:
    """Return the sum of the losses of a few rows, an fp32 scalar; the arguments are those of ``_ChunkLoss``.

    Uses as few eager operations as possible; on a CPU most of the time is spent in exp.

    Args:
        logits: (rows, padded vocabulary), bf16 or fp32; overwritten.
        target: (rows, 1) int64.
    """
    logits[:, vocabulary:] = -torch.inf
    largest = logits.amax(dim=1, keepdim=True)
    target_logit = logits.gather(1, target)
    gradient = F.softmax(logits, dim=-1, dtype=torch.float32)
    # log(sum(exp(logits))) = max(logits) - log(max(softmax)), which cannot underflow, saves a second pass of exp.
    total = (largest.float() - gradient.amax(dim=1, keepdim=True).log() - target_logit.float()).sum()
    if differentiate:
        gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
        logits.copy_(gradient)
    return total


def _fused_loss(logits: torch.Tensor, target: torch.Tensor, vocabulary: int, differentiate: bool) -> torch.Tensor:
    """Implement ``_ChunkLoss`` for a compiler to fuse: element-wise operations, maxima and sums only."""
    column = torch.arange(logits.shape[1], device=logits.device)
    scores = torch.where(column < vocabulary, logits.float(), -torch.inf)
    largest = scores.amax(dim=1, keepdim=True)
    log_sum = largest + (scores - largest).exp().sum(dim=1, keepdim=True).log()
    total = (log_sum - scores.gather(1, target)).sum()
    if differentiate:
        logits.copy_((scores - log_sum).exp() - (column == target).float())
    return total


@functools.cache
def _compiled() -> _ChunkLoss:
    return torch.compile(_fused_loss, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        vocabulary: int,
        chunk: int,
        differentiate: bool,
        chunk_loss: _ChunkLoss,
    ) -> torch.Tensor:
        tokens = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grads, head_grad = [], None
        for start in range(0, tokens, chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = product(part, head.t())  # (chunk, padded vocabulary)
            total += chunk_loss(logits, target, vocabulary, differentiate)
            if differentiate:
                hidden_grads.append(product(logits, head))
                # Accumulated over chunks in fp32: in bf16, small contributions would be rounded away.
                chunk_grad = product(logits.t(), part)
                if tokens <= chunk:
                    head_grad = chunk_grad
                elif head_grad is None:
                    head_grad = chunk_grad.float()
                else:
                    head_grad += chunk_grad
                del chunk_grad
            del logits  # free both before the next chunk's are allocated
        if head_grad is not None:
            ctx.save_for_backward(torch.cat(hidden_grads), head_grad)
            ctx.tokens, ctx.dtype = tokens, head.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.tokens
        return hidden_grad * scale, (head_grad * scale).to(ctx.dtype), None, None, None, None, None
