"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, tanh GELU, output head tied to the embedding.

Modules have the names of OpenAI's checkpoints (wte, wpe, h, ln_1, attn.c_attn, ...), so an export renames nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ds_gpt2.model.loss import cross_entropy
from ds_gpt2.model.matmul import linear
from ds_gpt2.model.shape import PADDED_VOCABULARY, VOCABULARY, ModelShape

_Extend = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class KeyValueCache:
    """Keys and values of the tokens so far, so that the next token costs one position instead of all."""

    def __init__(self) -> None:
        self.length = 0  # tokens cached
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens to a layer; return those of all its tokens.

        Args:
            k, v: (batch, heads, time, head width); the results have the same shape with a longer time.
        """
        if layer == len(self._layers):
            self._layers.append((k, v))
        else:
            past_k, past_v = self._layers[layer]
            self._layers[layer] = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        if layer == 0:
            self.length += k.shape[2]
        return self._layers[layer]

    def expand(self, rows: int) -> None:
        """Repeat the cache of one row for ``rows`` rows, without a copy."""
        self._layers = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self._layers]


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies bf16 in fp32 on CPUs without AVX-512; see ``matmul``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) of ``x`` (..., in_features), in the dtype of ``x``."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = dropout
        self.c_attn = Linear(shape.width, 3 * shape.width)
        self.c_proj = Linear(shape.width, shape.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, past: _Extend | None = None) -> torch.Tensor:
        """Return (batch, time, width) of ``x`` (batch, time, width).

        Args:
            mask: bool, broadcastable to (batch, heads, time, keys), True where a query attends; None is causal.
            past: appends keys and values to a cache and returns all of them; see ``KeyValueCache.extend``.
        """
        batch, time, width = x.shape
        q, k, v = self.c_attn(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past(k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(batch, time, width)  # (batch, heads, time, head width) -> (batch, time, width)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Position-wise feed-forward layer with a hidden width of four times the model's."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Linear(shape.width, 4 * shape.width)
        self.c_proj = Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, time, width) of ``x`` (batch, time, width)."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = Attention(shape, dropout)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = MLP(shape, dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, past: _Extend | None = None) -> torch.Tensor:
        """Return (batch, time, width) of ``x`` (batch, time, width); ``mask`` and ``past`` as in ``Attention``."""
        x = x + self.attn(self.ln_1(x), mask, past)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model. ``forward`` returns the training loss, ``logits`` the logits of the next token."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.wte = nn.Embedding(PADDED_VOCABULARY, shape.width)
        self.wpe = nn.Embedding(shape.sequence_length, shape.width)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self._compiled = False
        self._initialize()

    def compile_blocks(self) -> None:
        """Compile ``forward`` by regions: the block, whose code all blocks share, and a chunk of the loss.

        Regional compilation takes half as long as compiling the whole model (benchmarks/LOG.md). It applies to training
        only, where shapes are constant; evaluation and sampling run eagerly.
        """
        for block in self.h:
            block.compile(dynamic=False)
        self._compiled = True

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy in nats, an fp32 scalar.

        Args:
            tokens: (batch, time) int64, at most ``sequence_length`` long.
            targets: (batch, time) int64, the token that follows each of ``tokens``.
        """
        compiled = self._compiled and torch.is_grad_enabled()
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x) if compiled else block.forward(x)
        hidden = self.ln_f(x).flatten(0, 1)
        return cross_entropy(hidden, self.wte.weight, targets.flatten(), VOCABULARY, compiled)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states (batch, time, width) of ``tokens`` (batch, time) int64.

        Args:
            positions: (time,) or (batch, time) int64, below ``sequence_length``; None continues from the cache, or
                from 0.
            mask: bool, broadcastable to (batch, heads, time, keys): True where a token attends; None is causal.
            cache: of the tokens before these; these are appended to it.
        """
        cached, time = cache.length if cache is not None else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(cached, cached + time, device=tokens.device)
        if mask is None and cached:
            mask = torch.ones(time, cached + time, dtype=torch.bool, device=tokens.device).tril(cached)
        x = self._embed(tokens, positions)
        for layer, block in enumerate(self.h):
            past = functools.partial(cache.extend, layer) if cache is not None else None
            x = block.forward(x, mask, past)  # eager: each of many shapes would be compiled separately
        return self.ln_f(x)

    def logits(self, tokens: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Return the logits (batch, time, 50257) of the token after each position, in the dtype of the weights.

        Args:
            tokens: (batch, time) int64.
            cache: as in ``hidden``.
        """
        return linear(self.hidden(tokens, cache=cache), self.wte.weight[:VOCABULARY])

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.wte(tokens) + self.wpe(positions), self.dropout, self.training)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialize as GPT-2 does: weights N(0, 0.02), biases 0.

        The std of projections into the residual stream is scaled by 1 / sqrt(2 x layers) (Radford et al. 2019, 2.3).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.shape.layers) if residual else 0.02
                parameter.normal_(0.0, std)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: weight decay for matrices and embeddings, none for biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def flops_per_token(model: GPT2) -> float:
    """Return the training FLOPs per token, forward and backward: 6N + 12 L H Q T.

    N excludes the position embeddings. The formula is that of the PaLM paper (appendix B), used as in nanoGPT's
    ``estimate_mfu``; L is layers, H heads, Q the head width and T the sequence length.
    """
    shape = model.shape
    weights = shape.parameters - shape.sequence_length * shape.width
    return 6.0 * weights + 12.0 * shape.layers * shape.width * shape.sequence_length
