"""Generate text: greedy, or sampled with temperature, top-k and top-p, with a key-value cache.

The model has ``sequence_length`` positions. Only the last ``sequence_length`` tokens of a longer prompt are used. When
the context is full, its newest three quarters are computed again from position 0 and generation continues: positions
are learned, so cached keys and values are not valid at other positions. The context of a long text is therefore never
shorter than 3/4 of ``sequence_length``, and is recomputed about every ``sequence_length / 4`` tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.tokenizer import END_OF_TEXT, gpt2
from ds_gpt2.model.gpt2 import GPT2, KeyValueCache
from ds_gpt2.model.shape import VOCABULARY


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0  # divides the logits; 0: always the most probable token
    top_k: int | None = None  # only the k most probable tokens; None: all
    top_p: float = 1.0  # only the smallest set of tokens with this total probability (Holtzman et al. 2020)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature}: give 0 (always the most probable token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: give at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: give a value above 0, at most 1")


def generate(
    model: GPT2,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    *,
    count: int = 1,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return ``count`` continuations of ``prompt``, without the prompt, of up to ``tokens`` tokens each.

    A continuation that the model has ended closes with ``<|endoftext|>``. Each has its own random generator, so a seed
    gives the same continuations for any ``count``, up to rounding: matrix products of more rows may round differently,
    which rarely changes a token.

    Args:
        model: in eval mode; in training mode its dropout is applied.
        progress: called after each token of all continuations.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    seeds = [derived_seed(seed, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for chosen in itertools.islice(next_tokens(model, encode_prompt(prompt), sampling, seeds), tokens):
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row[-1:] != [END_OF_TEXT]:
                row.append(token)
        progress()
        if all(row[-1] == END_OF_TEXT for row in rows):
            break
    return [gpt2().decode(row) for row in rows]


def stream(model: GPT2, prompt: str, sampling: Sampling, *, seed: int = 0) -> Iterator[int]:
    """Yield the tokens of the first continuation of ``generate``, up to and including ``END_OF_TEXT``.

    The stream may be infinite: the caller limits it. One token may be only a part of a character.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    for chosen in next_tokens(model, encode_prompt(prompt), sampling, [derived_seed(seed, 0)]):
        token = int(chosen)
        yield token
        if token == END_OF_TEXT:
            return


def encode_prompt(prompt: str) -> list[int]:
    """Return the tokens of ``prompt``; an empty one becomes <|endoftext|>, which begins every training document."""
    return gpt2().encode_ordinary(prompt) or [END_OF_TEXT]


def derived_seed(seed: int, number: int) -> int:
    """Return the ``number``-th independent seed derived from ``seed``, a 64-bit integer; both at least 0."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def next_tokens(model: GPT2, prompt: Sequence[int], sampling: Sampling, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield, without end, the next token of each continuation of ``prompt``, (len(seeds),) int64 on the CPU.

    The global random state is not used.

    Args:
        model: in eval mode; in training mode its dropout is applied.
        prompt: at least one token; computed once for all continuations.
        seeds: of the random generator of each continuation.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    longest = model.shape.sequence_length
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    context = torch.tensor([prompt[-longest:]], device=model.wte.weight.device)
    cache = KeyValueCache()
    logits = _logits(model, context, cache).expand(len(seeds), -1)
    context = context.expand(len(seeds), -1)
    cache.expand(len(seeds))
    while True:
        chosen = choose(logits, sampling, generators)
        yield chosen
        context = torch.cat([context, chosen[:, None].to(context.device)], dim=1)
        if cache.length < longest:
            logits = _logits(model, context[:, -1:], cache)
        else:
            context, cache = context[:, -(longest - longest // 4) :], KeyValueCache()
            logits = _logits(model, context, cache)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distribution of the next token, (rows, vocabulary) fp64; 0 for tokens that the filters exclude.

    Args:
        logits: (rows, vocabulary), any float dtype.
        sampling: with a temperature above 0.
    """
    logits = logits.double()
    if sampling.top_k is not None:
        best, tokens = logits.topk(min(sampling.top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -torch.inf).scatter(1, tokens, best)
    best = logits.amax(-1, keepdim=True)
    shares = ((logits - best) / sampling.temperature).softmax(-1)  # of values <= 0, which no temperature overflows
    if sampling.top_p < 1:
        descending, tokens = shares.sort(-1, descending=True)
        more_probable = descending.cumsum(-1) - descending  # 0 for the first token, which is never excluded
        shares = shares.scatter(1, tokens, descending.masked_fill(more_probable >= sampling.top_p, 0.0))
    return shares / shares.sum(-1, keepdim=True)


def choose(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Choose one token per row, (rows,) int64, each row with its own random generator.

    Args:
        logits: (rows, vocabulary), on the CPU.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Cumulative in the order of the vocabulary: in the order of the probabilities, rounding could reorder tokens.
    limits = probabilities(logits, sampling).cumsum(-1)
    drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    return torch.searchsorted(limits, drawn[:, None] * limits[:, -1:], right=True).squeeze(1)


def _logits(model: GPT2, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Return the logits (rows, 50257) of the next token without padding, fp32 on the CPU."""
    last = model.hidden(tokens, cache=cache)[:, -1]
    logits = F.linear(last, model.wte.weight[:VOCABULARY]).float().cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("the model's scores are not finite")
    return logits
