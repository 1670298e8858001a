"""Measure HellaSwag items per second: batched scoring compared with two plain loops, alternating in one process.

``plain`` calls ``score_one`` for every item: four padded rows per item, with all logits. ``autocast`` does the same as
build-nanogpt: fp32 weights under bf16 autocast. The file of --out has one entry per setting.

    python benchmarks/hellaswag.py --file data/hellaswag/hellaswag_val.jsonl --preset 7M --items 200 --out FILE
    python benchmarks/hellaswag.py --file data/hellaswag/hellaswag_val.jsonl --train 200 --data data/sample --out FILE
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from benchmarks.program import make_parser
from ds_gpt2.config.sections import PRESETS
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.hellaswag import ENDINGS, load_items
from ds_gpt2.data.items import Item
from ds_gpt2.distributed import device
from ds_gpt2.evaluation.scoring import CLOSE, MEASURES, Array, Scores, score, score_batched, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape

CONTEXT = 1024
WINDOW = 256  # tokens of a training window; all items are shorter
WINDOWS = 8  # per step


def main() -> None:
    parser = make_parser(__doc__, "--file", "--out")
    parser.add_argument("--preset", choices=PRESETS, default="7M")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=200, help="number of items, evenly spaced in the file")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--gain", type=float, default=1.0, help="factor of the random weights")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train first, on --data")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    torch_device = device.choose(options.device)
    torch.set_num_threads(options.threads)
    masters = _model(options).to(torch_device).eval()
    result = _measure(masters, getattr(torch, options.dtype), _items(options.file, options.items), options.rounds)
    name = f"{options.preset}, {options.dtype}, {torch_device.type}, " + _weights(options)
    _add_result(options.out, name, {"machine": machine.describe(), "threads": options.threads, **result})
    print(json.dumps({name: result}, indent=1))


def _weights(options: argparse.Namespace) -> str:
    if options.train:
        return f"trained for {options.train} steps"
    return "random weights" + (f" x {options.gain}" if options.gain != 1 else "")


def _add_result(file: Path, name: str, result: dict[str, Any]) -> None:
    runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(runs | {name: result}, indent=1) + "\n", encoding="utf-8")


def _items(file: Path, count: int) -> list[Item]:
    with tempfile.TemporaryDirectory() as folder:
        items = load_items(file, "original", Path(folder))
    return [items[number * len(items) // count] for number in range(count)]


def _model(options: argparse.Namespace) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(ModelShape(*PRESETS[options.preset], sequence_length=CONTEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(options.gain)
    if options.train:
        _train(model, Windows(open_dataset(options.data), "train", WINDOW), options.train)
    return model


def _train(model: GPT2, windows: Windows, steps: int) -> None:
    """Train for a short time, so that the model knows the frequencies of words and of some pairs."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        rows = torch.from_numpy(windows.read(rng.integers(len(windows), size=WINDOWS)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def _autocast(model: GPT2, item: Item) -> Array:
    """Score an item as build-nanogpt does: fp32 weights under bf16 autocast, logits of all positions with padding."""
    torch_device, start = model.wte.weight.device, len(item.context)
    tokens = torch.zeros(ENDINGS, start + max(map(len, item.endings)), dtype=torch.int64)
    scored = torch.zeros(tokens.shape, dtype=torch.float32)
    for row, ending in enumerate(item.endings):
        line = np.concatenate([item.context, ending]).astype(np.int64)
        tokens[row, : len(line)] = torch.from_numpy(line)
        scored[row, start : len(line)] = 1
    tokens, scored = tokens.to(torch_device), scored.to(torch_device)
    with torch.autocast(torch_device.type, torch.bfloat16):
        logits = F.linear(model.hidden(tokens), model.wte.weight)
    logits = logits[:, :-1, :VOCABULARY].contiguous()
    losses = F.cross_entropy(logits.view(-1, VOCABULARY).float(), tokens[:, 1:].flatten(), reduction="none")
    return -(losses.view(ENDINGS, -1) * scored[:, 1:]).sum(dim=1).cpu().double().numpy()


def _measure(masters: GPT2, dtype: torch.dtype, items: list[Item], rounds: int) -> dict[str, Any]:
    model = copy.deepcopy(masters).to(dtype)
    loops: dict[str, Callable[[list[Item]], Array]] = {
        "ds_gpt2": lambda part: score(model, part).sums,
        "plain": lambda part: np.stack([score_one(model, item) for item in part]),
    }
    if dtype is torch.bfloat16:
        loops["autocast"] = lambda part: np.stack([_autocast(masters, item) for item in part])
    for loop in loops.values():
        loop(items[:2])  # warm up
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in loops} for clock in clocks}
    sums: dict[str, list[Array]] = {name: [] for name in loops}
    parts = [items[number::rounds] for number in range(rounds)]
    for number, part in enumerate(parts):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            start_time = {clock: now() for clock, now in clocks.items()}
            sums[name].append(loops[name](part))
            for clock, now in clocks.items():
                seconds[clock][name].append(now() - start_time[clock])
        taken = ", ".join(f"{name} {seconds['wall'][name][-1]:.1f} s" for name in loops)
        print(f"round {number + 1}: {taken}", flush=True)
    ordered = [item for part in parts for item in part]
    return {
        "items": len(items),
        **{clock: _speeds([len(part) for part in parts], taken) for clock, taken in seconds.items()},
        **_agreement(score_batched(model, ordered), np.concatenate(sums["ds_gpt2"]), np.concatenate(sums["plain"])),
    }


def _speeds(items: list[int], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return speeds by one clock. Processor time counts all threads and depends less on other load."""
    rates = {name: [count / each for count, each in zip(items, taken, strict=True)] for name, taken in seconds.items()}
    ours = rates.pop("ds_gpt2")
    others = {
        f"ds_gpt2 against {name}": _of_rounds([own / rate for own, rate in zip(ours, rates[name], strict=True)])
        for name in rates
    }
    return {"items_per_s": {name: _of_rounds(each) for name, each in {"ds_gpt2": ours, **rates}.items()}, **others}


def _of_rounds(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 2), "rounds": [round(value, 2) for value in values]}


def _agreement(fast: Scores, ours: Array, plain: Array) -> dict[str, Any]:
    """Compare the answers with the plain loop, and the sums of batched scoring before items are scored again."""
    answers = {
        name: (values[None] / fast.lengths).argmax(axis=2)
        for name, values in (("ours", ours), ("fast", fast.sums), ("plain", plain))
    }
    errors = fast.sums - plain
    one, other = np.triu_indices(ENDINGS, 1)
    pairs = (errors[:, one] - errors[:, other]) / np.hypot(fast.rounding[:, one], fast.rounding[:, other])
    return {
        "answers": ours.shape[0] * len(MEASURES),
        "answers that differ from the plain loop's": int((answers["ours"] != answers["plain"]).sum()),
        "and would, if none were scored again": int((answers["fast"] != answers["plain"]).sum()),
        "share of items scored again": round(float(fast.close().mean()), 4),
        "sums, largest difference from the plain loop's, nats": float(np.abs(errors).max()),
        "the same, between two endings, in units of their rounding": {
            "root mean square": round(float(np.sqrt((pairs**2).mean())), 3),
            "largest": round(float(np.abs(pairs).max()), 3),
            "taken for close": CLOSE,
        },
        "mean sum, nats": round(float(plain.mean()), 2),
    }


if __name__ == "__main__":
    main()
