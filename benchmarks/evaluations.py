"""Measure items per second of each evaluation: batched scoring against the loop over single items, alternating.

The items are invented, with numbers of tokens that are typical for each evaluation. Both arms run in one process on
the same items, and their answers are compared.

    python benchmarks/evaluations.py --preset 124M --items 200 --out FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from benchmarks.program import make_parser, report_result
from ds_gpt2.config.sections import PRESETS
from ds_gpt2.data.evaluation_files import LAST_WORD, measures_of
from ds_gpt2.data.items import Item
from ds_gpt2.distributed import device
from ds_gpt2.evaluation import tasks
from ds_gpt2.evaluation.loss import Array
from ds_gpt2.evaluation.scoring import is_greedy, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape

CONTEXT = 1024
# Invented: tokens of a context, of an ending, and the number of endings; each item has half to one and a half of them.
TYPICAL = {
    "arc_challenge": (30, 6, 4),
    "arc_easy": (25, 5, 4),
    "boolq": (140, 1, 2),
    "copa": (8, 7, 2),
    "lambada": (85, 2, 1),
    "openbookqa": (12, 4, 4),
    "piqa": (12, 22, 2),
    "sciq": (120, 2, 4),
    "winogrande": (15, 8, 2),
}


def main() -> None:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--preset", choices=PRESETS, default="7M")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=200, help="number of items of each evaluation")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = _model(options)
    found = {name: _measure(model, name, options.items, options.rounds) for name in TYPICAL}
    settings = {"preset": options.preset, "dtype": options.dtype, "threads": options.threads, "items": options.items}
    report_result(options.out, {"machine": machine.describe(), **settings, "evaluations": found})


def _model(options: argparse.Namespace) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(ModelShape(*PRESETS[options.preset], sequence_length=CONTEXT))
    return model.to(device.choose(options.device), getattr(torch, options.dtype)).eval()


def _items(name: str, count: int) -> list[Item]:
    rng = np.random.default_rng(0)
    context, ending, endings = TYPICAL[name]

    def tokens(typical: int) -> Any:
        length = max(1, round(typical * rng.uniform(0.5, 1.5)))
        return rng.integers(0, VOCABULARY - 1, length).astype(np.uint16)

    lengths = np.arange(1, 1 + endings, dtype=np.int32)
    return [
        Item(tokens(context), [tokens(ending) for _ in range(endings)], number % endings, lengths, lengths)
        for number in range(count)
    ]


def _measure(model: GPT2, name: str, count: int, rounds: int) -> dict[str, Any]:
    items, measures = _items(name, count), measures_of(name)
    rates: dict[str, list[float]] = {"batched": [], "plain": []}
    differ = 0
    for number in range(rounds + 1):  # the first warms up
        part = items[max(0, number - 1) :: rounds]
        tables = {}
        for arm in list(rates)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            tables[arm] = _arm(arm, model, part, measures)
            if number:
                rates[arm].append(len(part) / (time.perf_counter() - start))
        compared = 1 if name == LAST_WORD else len(measures)  # perplexities are not answers
        differ += int((tables["batched"][:compared] != tables["plain"][:compared]).sum()) if number else 0
    ratios = [ours / plain for ours, plain in zip(rates["batched"], rates["plain"], strict=True)]
    print(f"{name}: {statistics.median(ratios):.2f}", flush=True)
    return {
        "items_per_s": {arm: _of_rounds(each) for arm, each in rates.items()},
        "batched against plain": _of_rounds(ratios),
        "answers that differ": differ,
    }


def _arm(arm: str, model: GPT2, items: Sequence[Item], measures: Sequence[str]) -> Array:
    """Return the results (measures, items) of one arm, see ``tasks.results``."""
    if arm == "batched":
        return tasks.results(model, items, measures, lambda done: None)
    rows = []
    for item in items:
        sums = score_one(model, item)
        values = {"acc": float(sums.argmax() == item.label), "perplexity": float(sums[0])}
        values["acc_norm"] = float((sums / item.characters).argmax() == item.label)
        if "perplexity" in measures:
            values["acc"] = float(is_greedy(model, item))
        rows.append([values[measure] for measure in measures])
    return np.array(rows).T


def _of_rounds(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 2), "rounds": [round(value, 2) for value in values]}


if __name__ == "__main__":
    main()
