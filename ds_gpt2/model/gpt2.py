"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, tanh GELU, output head tied to the embedding.

Modules carry the names of OpenAI's checkpoints (wte, wpe, h, ln_1, attn.c_attn, ...), so exports need no table.
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
    """What attention has computed of the tokens so far, so that the next token costs one position, not all."""

    def __init__(self) -> None:
        self.length = 0  # tokens held
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values (batch, heads, time, head width) of new tokens; returns all of the layer."""
        if layer == len(self._layers):
            self._layers.append((k, v))
        else:
            past_k, past_v = self._layers[layer]
            self._layers[layer] = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        if layer == 0:
            self.length += k.shape[2]
        return self._layers[layer]

    def expand(self, rows: int) -> None:
        """Let ``rows`` rows share what one row has filled in."""
        self._layers = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self._layers]


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies bf16 in fp32 on CPUs without AVX-512; see ``matmul``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
        batch, time, width = x.shape
        q, k, v = self.c_attn(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past(k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(batch, time, width)  # (batch, heads, time, head width) -> (batch, time, width)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Linear(shape.width, 4 * shape.width)
        self.c_proj = Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
        x = x + self.attn(self.ln_1(x), mask, past)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model. ``forward`` returns the training loss, ``logits`` the scores of the next token."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.wte = nn.Embedding(PADDED_VOCABULARY, shape.width)
        self.wpe = nn.Embedding(shape.sequence_length, shape.width)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self._compiled = False
        self._initialise()

    def compile_blocks(self) -> None:
        """Have ``forward`` compiled, block by block and chunk by chunk: all blocks share what one of them needs.

        (PyTorch calls it regional compilation; it takes half as long as the whole model, see benchmarks/LOG.md.)

        Only in training, where shapes stay the same from step to step: whatever evaluates runs as it is written.
        """
        for block in self.h:
            block.compile(dynamic=False)
        self._compiled = True

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats, fp32 scalar, of ``targets`` (batch, time) given ``tokens`` (batch, time)."""
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
        """Final hidden states (batch, time, width) of ``tokens`` (batch, time), int64.

        Args:
            positions: (time,) or (batch, time), int64, below ``sequence_length``; None counts on from the cache, or
                from 0.
            mask: bool, broadcastable to (batch, heads, time, keys): True where a token may look; None is causal.
            cache: tokens before these, to which these are added.
        """
        done, time = cache.length if cache is not None else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(done, done + time, device=tokens.device)
        if mask is None and done:
            mask = torch.ones(time, done + time, dtype=torch.bool, device=tokens.device).tril(done)
        x = self._embed(tokens, positions)
        for layer, block in enumerate(self.h):
            past = functools.partial(cache.extend, layer) if cache is not None else None
            x = block.forward(x, mask, past)  # never compiled: each of many shapes would be, anew
        return self.ln_f(x)

    def logits(self, tokens: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Scores (batch, time, 50257) of the token after each position; ``cache`` as in ``hidden``."""
        return linear(self.hidden(tokens, cache=cache), self.wte.weight[:VOCABULARY])

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.wte(tokens) + self.wpe(positions), self.dropout, self.training)

    @torch.no_grad()
    def _initialise(self) -> None:
        """N(0, 0.02), zero biases; projections into the residual stream scaled by 1/sqrt(2 x layers), as GPT-2 does."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.shape.layers) if residual else 0.02
                parameter.normal_(0.0, std)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay on matrices and embeddings, none on biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def count_parameters(model: nn.Module) -> int:
    """All parameters, the padding rows of the vocabulary included."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: GPT2) -> float:
    """Training FLOPs per token, forward and backward: 6N + 12 L H Q T, N without position embeddings.

    The PaLM paper's appendix B as nanoGPT's ``estimate_mfu`` applies it.
    """
    shape = model.shape
    weights = count_parameters(model) - model.wpe.weight.numel()
    return 6.0 * weights + 12.0 * shape.layers * shape.width * shape.sequence_length
