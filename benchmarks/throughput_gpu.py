"""Tokens a second of the engine beside loops without it, turn by turn in one process on one device.

    deepspeed --num_gpus 1 benchmarks/throughput_gpu.py --preset 124M --data data/sample --out FILE

The arms train on the same windows from the same weights; their losses are compared first.

- ``engine``: ds_gpt2 under DeepSpeed, compiled; ``engine, eager``: the same without torch.compile.
- ``bare``: the same model, loss and compilation without DeepSpeed: bf16 weights, gradients summed in fp32, masters in
  fp32, torch's fused AdamW, in a loop of its own. What ``engine`` is slower is what DeepSpeed costs.
- ``plain``: what a user would write instead (reference.py): fp32 under autocast, all compiled as a whole.
- ``plain, eager``: that without torch.compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import Settings
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_report

Step = Callable[[int], float]  # the number of a step -> its loss
ARMS = ("engine", "engine, eager", "bare", "plain", "plain, eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="124M")
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=4, help="what one GPU of four does of 524,288 tokens")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--curve", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="beside engine")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = device.choose("auto")
    set_up_compiler(_settings(options, True), place)
    from benchmarks import machine
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(place)
    result = _measure(_build(options, place), options, place)
    shown = {"machine": machine.describe(), "command": " ".join(sys.argv), **result}
    if collectives.is_main():
        options.out.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: value for name, value in shown.items() if name != "curves"}, indent=1), flush=True)
    close_process_group()


def _settings(options: argparse.Namespace, compiled: bool) -> Settings:
    length, micro = options.sequence_length, options.micro_batch
    sizes = {
        "batch.sequence_length": length,
        "batch.micro_batch": micro,
        "batch.tokens_per_step": length * micro * options.accumulation * collectives.world_size(),
        "schedule.steps": 1000,
        "schedule.warmup_steps": 10,
        "schedule.max_lr": 6e-4,
        "schedule.min_lr": 6e-5,
        "run.compile": str(compiled).lower(),
    }
    return settings_of(options.data, options.preset, **{name: str(value) for name, value in sizes.items()})


def _build(options: argparse.Namespace, place: torch.device) -> dict[str, Step]:
    from benchmarks.bare import Bare
    from benchmarks.reference import Reference
    from benchmarks.trainer import Trainer

    makers: dict[str, Callable[[], Step]] = {
        "engine": lambda: Trainer(_settings(options, True), place).step,
        "engine, eager": lambda: Trainer(_settings(options, False), place).step,
        "bare": lambda: Bare(_settings(options, True), place).step,
        "plain": lambda: Reference(_settings(options, True), place, compiled=True).step,
        "plain, eager": lambda: Reference(_settings(options, False), place).step,
    }
    return {name: makers[name]() for name in ARMS if name in {"engine", *options.arms}}


def _measure(arms: dict[str, Step], options: argparse.Namespace, place: torch.device) -> dict[str, Any]:
    first: dict[str, float] = {}  # seconds of the first step: what is compiled is compiled then
    curves: dict[str, list[float]] = {}
    for name, step in arms.items():
        begun = time.perf_counter()
        curves[name] = [step(1)]
        first[name] = round(time.perf_counter() - begun, 2)
        curves[name] += [step(number) for number in range(2, options.curve + 1)]
        print(f"{name}: first step {first[name]} s, losses {curves[name][0]:.4f} to {curves[name][-1]:.4f}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    done = options.curve
    for number in range(options.rounds):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            arms[name](done + 1)  # what the arm before it left in caches
            _wait_for(place)
            begun = time.perf_counter()
            for step_number in range(done + 2, done + 2 + options.steps):
                arms[name](step_number)
            _wait_for(place)  # a step ends when its loss is known, with the update still to be done
            seconds[name].append((time.perf_counter() - begun) / options.steps)
        done += options.steps + 1
    settings = _settings(options, True)
    return {
        "setting": f"{options.preset}, T={options.sequence_length}, micro-batch {options.micro_batch} x"
        f" {options.accumulation}, {collectives.world_size()} rank(s)",
        "first_step_s": first,
        **_speeds(seconds, settings, place),
        "loss_differences_from_plain": _differences(curves),
        "curves": curves,
    }


def _wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def _speeds(seconds: dict[str, list[float]], settings: Settings, place: torch.device) -> dict[str, Any]:
    from ds_gpt2.model.gpt2 import GPT2, flops_per_token
    from ds_gpt2.model.shape import ModelShape

    tokens = settings.batch.tokens_per_step
    with torch.device("meta"):
        flops = flops_per_token(GPT2(ModelShape(*settings.model.shape, settings.batch.sequence_length)))
    peak = (device.peak_flops(place) or 0.0) * collectives.world_size()
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    return {
        "tokens_per_s": {
            name: {"median": round(rate), "rounds": [round(tokens / each) for each in seconds[name]]}
            for name, rate in rates.items()
        },
        "mfu": {name: round(rate * flops / peak, 4) for name, rate in rates.items()} if peak else None,
        "engine_against": {name: _ratio(each, seconds["engine"]) for name, each in seconds.items() if name != "engine"},
    }


def _ratio(others: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as fast, round by round; the interval is a bootstrap's of the median (10,000 resamples, 95%)."""
    ratios = np.array(others) / np.array(ours)
    resampled = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"median": round(float(np.median(ratios)), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def _differences(curves: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    if "plain" not in curves:
        return {}
    gaps = {name: np.array(curve) - np.array(curves["plain"]) for name, curve in curves.items() if name != "plain"}
    return {
        name: {"mean_absolute": round(float(np.abs(gap).mean()), 5), "largest": round(float(np.abs(gap).max()), 5)}
        for name, gap in gaps.items()
    }


if __name__ == "__main__":
    main()
    exit_report.end_process(exit_report.DONE)
