"""Measure generated tokens per second with and without the key-value cache.

Both arms generate four continuations of one prompt, alternating in one process, in bf16 with random weights.

    python benchmarks/generate.py --out benchmarks/results/generate_cpu.json
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from ds_gpt2.config.sections import PRESETS
from ds_gpt2.evaluation.sampling import Sampling, choose, encode_prompt, next_tokens
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape

SEQUENCE = 1024
CONTINUATIONS, TOKENS = 4, 48
SAMPLING = Sampling(temperature=0.8, top_k=50)
PROMPT = encode_prompt("Hello, I'm a language model,")
SEEDS = range(CONTINUATIONS)

Tokens = Iterator[torch.Tensor]


def main() -> None:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--presets", nargs="+", default=["7M", "124M"], choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = {
        "setting": f"{len(PROMPT)} tokens continued {CONTINUATIONS} times by {TOKENS} tokens, temperature"
        f" {SAMPLING.temperature}, top-k {SAMPLING.top_k}, bf16, {torch.get_num_threads()} threads",
        "tokens_per_s": {preset: _measure(preset, options.rounds) for preset in options.presets},
    }
    report_result(options.out, result)


def _measure(preset: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT2(ModelShape(*PRESETS[preset], SEQUENCE)).to(device, torch.bfloat16).eval()
    arms: dict[str, Callable[[], Tokens]] = {
        "with cache": lambda: next_tokens(model, PROMPT, SAMPLING, SEEDS),
        "without": lambda: _without_cache(model),
    }
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(1 + rounds):
        for arm, generate in arms.items():
            rates[arm].append(_rate(generate()))
    counted = {arm: found[1:] for arm, found in rates.items()}  # the first round warms up
    ratios = [one / other for one, other in zip(*counted.values(), strict=True)]
    return {
        **{arm: _summary(found, digits=1) for arm, found in counted.items()},
        "ratio": _summary(ratios, digits=2),
    }


def _rate(tokens: Tokens) -> float:
    """Return new tokens per second, including the computation of the prompt."""
    start_time = time.perf_counter()
    for _ in itertools.islice(tokens, TOKENS):
        pass
    return CONTINUATIONS * TOKENS / (time.perf_counter() - start_time)


@torch.no_grad()
def _without_cache(model: GPT2) -> Tokens:
    """Compute the whole text again for every token."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    text = torch.tensor([PROMPT] * CONTINUATIONS, device=model.wte.weight.device)
    while True:
        logits = F.linear(model.hidden(text)[:, -1], model.wte.weight[:VOCABULARY])
        chosen = choose(logits.float().cpu(), SAMPLING, generators)
        yield chosen
        text = torch.cat([text, chosen[:, None].to(text.device)], dim=1)


def _summary(values: list[float], digits: int) -> dict[str, Any]:
    return {"median": round(statistics.median(values), digits), "rounds": [round(value, digits) for value in values]}


if __name__ == "__main__":
    main()
