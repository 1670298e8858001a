"""Compare tokens per second of the engine and of plain loops, alternating in one process on one device.

    deepspeed --num_gpus 1 benchmarks/throughput_gpu.py --preset 124M --data data/sample --out FILE

The arms train on the same windows from the same initial weights; their losses are compared first.

- ``engine``: ds_gpt2 under DeepSpeed, compiled; ``engine, eager``: the same without torch.compile.
- ``bare``: the same model, loss and compilation in a plain loop without DeepSpeed: bf16 weights, fp32 gradient
  accumulation, fp32 master weights, torch's fused AdamW. The difference to ``engine`` is the cost of DeepSpeed.
- ``plain``: a plain PyTorch loop (reference.py): fp32 under autocast, compiled as a whole.
- ``plain, eager``: the same without torch.compile.
"""

from __future__ import annotations

import argparse
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

from benchmarks.program import make_parser, report_result
from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import Settings
from ds_gpt2.distributed import collectives, device
from ds_gpt2.distributed.peak_flops import peak_flops
from ds_gpt2.run_dir import exit_codes, process_end

Step = Callable[[int], float]  # step number -> loss
ARMS = ("engine", "engine, eager", "bare", "plain", "plain, eager")


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--preset", default="124M")
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument(
        "--accumulation",
        type=int,
        default=4,
        help="of a step (default: 524,288 tokens on four GPUs)",
    )
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="steps per block")
    parser.add_argument("--curve", type=int, default=20, help="steps for the comparison of losses")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="in addition to engine")
    options = parser.parse_args()
    torch_device = device.choose("auto")
    set_up_compiler(_settings(options, True), torch_device)
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    result = _measure(_build(options, torch_device), options, torch_device)
    if collectives.is_main():
        report_result(options.out, result, "curves")
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


def _build(options: argparse.Namespace, torch_device: torch.device) -> dict[str, Step]:
    from benchmarks.bare import Bare
    from benchmarks.reference import Reference
    from benchmarks.trainer import Trainer

    makers: dict[str, Callable[[], Step]] = {
        "engine": lambda: Trainer(_settings(options, True), torch_device).step,
        "engine, eager": lambda: Trainer(_settings(options, False), torch_device).step,
        "bare": lambda: Bare(_settings(options, True), torch_device).step,
        "plain": lambda: Reference(_settings(options, True), torch_device, compiled=True).step,
        "plain, eager": lambda: Reference(_settings(options, False), torch_device).step,
    }
    return {name: makers[name]() for name in ARMS if name in {"engine", *options.arms}}


def _measure(arms: dict[str, Step], options: argparse.Namespace, torch_device: torch.device) -> dict[str, Any]:
    first: dict[str, float] = {}  # seconds of the first step, including compilation
    curves: dict[str, list[float]] = {}
    for name, step in arms.items():
        start_time = time.perf_counter()
        curves[name] = [step(1)]
        first[name] = round(time.perf_counter() - start_time, 2)
        curves[name] += [step(number) for number in range(2, options.curve + 1)]
        print(f"{name}: first step {first[name]} s, losses {curves[name][0]:.4f} to {curves[name][-1]:.4f}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    done = options.curve
    for number in range(options.rounds):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            arms[name](done + 1)  # warm up after the previous arm
            _wait_for(torch_device)
            start_time = time.perf_counter()
            for step_number in range(done + 2, done + 2 + options.steps):
                arms[name](step_number)
            _wait_for(torch_device)  # a step returns its loss before the update is complete
            seconds[name].append((time.perf_counter() - start_time) / options.steps)
        done += options.steps + 1
    settings = _settings(options, True)
    return {
        "setting": f"{options.preset}, T={options.sequence_length}, micro-batch {options.micro_batch} x"
        f" {options.accumulation}, {collectives.world_size()} rank(s)",
        "first_step_s": first,
        **_speeds(seconds, settings, torch_device),
        "loss_differences_from_plain": _differences(curves),
        "curves": curves,
    }


def _wait_for(torch_device: torch.device) -> None:
    if torch_device.type == "cuda":
        torch.cuda.synchronize()


def _speeds(seconds: dict[str, list[float]], settings: Settings, torch_device: torch.device) -> dict[str, Any]:
    from ds_gpt2.model.gpt2 import GPT2, flops_per_token
    from ds_gpt2.model.shape import ModelShape

    tokens = settings.batch.tokens_per_step
    with torch.device("meta"):
        flops = flops_per_token(GPT2(ModelShape(*settings.model.shape, settings.batch.sequence_length)))
    peak = (peak_flops(torch_device) or 0.0) * collectives.world_size()
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
    """Return the median speedup over rounds with its 95 % bootstrap interval (10,000 resamples)."""
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
    process_end.end_process(exit_codes.DONE)
