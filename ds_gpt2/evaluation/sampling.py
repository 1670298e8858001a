"""Text from a model: greedy, or drawn by temperature, top-k and top-p, with what is computed of earlier tokens kept.

The model knows ``sequence_length`` positions. Of a longer prompt only the last so many tokens count. Text that grows
beyond them keeps its newest three quarters as context and goes on from there: positions are learned, so what is cached
for one position holds for no other, and that part is computed again. A long text's context is thus never shorter than
three quarters of what the model knows, and the recomputation comes about every ``sequence_length / 4`` tokens.
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
    """How the next token is chosen. The filters apply in this order.

    Raises:
        UserError: a value that means nothing.
    """

    temperature: float = 1.0  # scores are divided by it; 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens; None: all
    top_p: float = 1.0  # only the fewest tokens that have this share of the probability (Holtzman et al. 2020)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature}: give 0 (always the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: give at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: give a share above 0, at most 1")


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
    """``count`` continuations of ``prompt``, without the prompt, of up to ``tokens`` tokens each.

    A continuation that the model ended itself closes with ``<|endoftext|>``. Each has a random generator of its own,
    so the same seed gives the same continuation whatever ``count`` is, up to rounding: a matrix product of more rows
    may round differently, and rarely that decides between two tokens. For the mode (eval, train) see ``next_tokens``.

    Args:
        progress: called after each token of all continuations.

    Raises:
        FloatingPointError: the model's scores are not finite.
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
    """The tokens of one continuation as they are chosen, those of ``generate``; the last one is ``END_OF_TEXT``.

    There may never be a last one: take as many as wanted. One token may be a part of a character only.

    Raises:
        FloatingPointError: the model's scores are not finite.
    """
    for chosen in next_tokens(model, encode_prompt(prompt), sampling, [derived_seed(seed, 0)]):
        token = int(chosen)
        yield token
        if token == END_OF_TEXT:
            return


def encode_prompt(prompt: str) -> list[int]:
    """The prompt's tokens; an empty one is the end of the text before it, as every document has it in training."""
    return gpt2().encode_ordinary(prompt) or [END_OF_TEXT]


def derived_seed(seed: int, number: int) -> int:
    """A seed for part ``number`` of what ``seed`` stands for; both at least 0."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def next_tokens(model: GPT2, prompt: Sequence[int], sampling: Sampling, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
    """Token after token of several continuations of ``prompt``, (len(seeds),) int64 on the CPU, without end.

    The model's mode is left to the caller: in training mode its dropout acts. The global random state is untouched.

    Args:
        prompt: at least one token; computed once for all continuations.

    Raises:
        FloatingPointError: the model's scores are not finite.
    """
    longest = model.shape.sequence_length
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    context = torch.tensor([prompt[-longest:]], device=model.wte.weight.device)
    cache = KeyValueCache()
    scores = _scores(model, context, cache).expand(len(seeds), -1)
    context = context.expand(len(seeds), -1)
    cache.expand(len(seeds))
    while True:
        chosen = choose(scores, sampling, generators)
        yield chosen
        context = torch.cat([context, chosen[:, None].to(context.device)], dim=1)
        if cache.length < longest:
            scores = _scores(model, context[:, -1:], cache)
        else:
            context, cache = context[:, -(longest - longest // 4) :], KeyValueCache()
            scores = _scores(model, context, cache)


def probabilities(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What the next token is drawn from, (rows, vocabulary) fp64, 0 for what the filters leave out.

    Args:
        scores: (rows, vocabulary), any float dtype; the temperature must not be 0.
    """
    scores = scores.double()
    if sampling.top_k is not None:
        best, tokens = scores.topk(min(sampling.top_k, scores.shape[-1]))
        scores = torch.full_like(scores, -torch.inf).scatter(1, tokens, best)
    best = scores.amax(-1, keepdim=True)
    shares = ((scores - best) / sampling.temperature).softmax(-1)  # at most 0: no temperature makes them infinite
    if sampling.top_p < 1:
        falling, tokens = shares.sort(-1, descending=True)
        likelier = falling.cumsum(-1) - falling  # 0 for the first, which therefore always stays
        shares = shares.scatter(1, tokens, falling.masked_fill(likelier >= sampling.top_p, 0.0))
    return shares / shares.sum(-1, keepdim=True)


def choose(scores: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token a row, (rows,) int64, each row by its own random generator.

    Args:
        scores: (rows, vocabulary), on the CPU.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1)
    # Limits in the order of the vocabulary: in that of the probabilities, rounding would make tokens change places.
    limits = probabilities(scores, sampling).cumsum(-1)
    drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    return torch.searchsorted(limits, drawn[:, None] * limits[:, -1:], right=True).squeeze(1)


def _scores(model: GPT2, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Scores (rows, 50257) of the token after the last one, fp32 on the CPU: padding cannot be chosen."""
    last = model.hidden(tokens, cache=cache)[:, -1]
    scores = F.linear(last, model.wte.weight[:VOCABULARY]).float().cpu()
    if not scores.isfinite().all():
        raise FloatingPointError("the model's scores are not finite")
    return scores
