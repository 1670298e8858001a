"""How long does training wait for its data?

    python benchmarks/loader.py [--ranks 4] [--played 2] [--tokens_per_s 2000000] [--steps 100] [--out FILE]

Shards of random tokens are written. Then processes take the micro-batches of their ranks, step after step, as training
does, and between two of them do what training on a GPU leaves to the processor: call small operations of PyTorch
without a pause, as one who launches kernels does (``launching``), or nothing (``idle``: what is done first afterwards
is done by a processor that has forgotten it). They take as long over it as devices would that train so many tokens a
second, all ranks together. The time until a micro-batch is there is the wait. ``read`` is how long it takes to read a
step's windows, which is done meanwhile.

``warm``: the shards are in memory, as they are once they have been read. ``cold``: before every step the system is told
to forget all of them, so that every window is fetched from the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.shards import header_of
from ds_gpt2.model.shape import VOCABULARY

SEQUENCE, MICRO_BATCH, TOKENS_PER_STEP = 1024, 16, 524_288  # GPT-2's
SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Kind:
    """How the steps are gone through."""

    steps: int
    step_seconds: float
    cold: bool
    launching: bool


def main() -> None:
    options = _options()
    accumulation = TOKENS_PER_STEP // (SEQUENCE * MICRO_BATCH * options.ranks)
    plan = BatchPlan(MICRO_BATCH, SEQUENCE, accumulation, options.ranks)
    step_seconds = plan.tokens_per_step / options.tokens_per_s
    results: dict[str, Any] = {
        "played": options.played,
        "plan": str(plan),
        "step_ms": round(1000 * step_seconds, 1),
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        _write_shards(Path(name), options.shards)
        for cache in ("warm", "cold"):
            results[f"{cache}_read_ms"] = _read_ms(Path(name), plan, cache == "cold")
            for between in ("launching", "idle"):
                kind = Kind(options.steps, step_seconds, cache == "cold", between == "launching")
                found = _measure(Path(name), plan, options.played, kind)
                results[f"{cache}_{between}"] = found
                print(cache, between, json.dumps(found), flush=True)
    if options.out:
        from benchmarks.machine import describe

        options.out.write_text(json.dumps({**results, "machine": describe()}, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="that share the data (default: 4)")
    cores = os.cpu_count() or 1
    parser.add_argument("--played", type=int, default=min(4, cores), metavar="N", help="of them (default: one a core)")
    parser.add_argument("--tokens_per_s", type=float, default=2_000_000, metavar="N", help="of all ranks together")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each kind (default: 100)")
    parser.add_argument("--shards", type=int, default=10, metavar="N", help="of 100 M tokens, 200 MB (default: 10)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where they are written (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    return parser.parse_args()


def _write_shards(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        with (folder / f"random_train_{number:06d}.bin").open("wb") as file:
            file.write(header_of(SHARD_TOKENS))
            file.write(rng.integers(0, VOCABULARY, SHARD_TOKENS, np.uint16).tobytes())
            file.flush()
            os.fsync(file.fileno())  # what is not on the disk cannot be forgotten


def _measure(folder: Path, plan: BatchPlan, played: int, kind: Kind) -> dict[str, float]:
    """Share of the time that was waited, over all ranks and steps, and single steps' waits in ms."""
    with multiprocessing.get_context("spawn").Pool(played) as pool:
        waits = pool.starmap(consume, [(folder, plan, rank, kind) for rank in range(played)], chunksize=1)
    each = [wait for rank in waits for wait in rank]
    return {
        "wait_percent": round(100 * statistics.mean(each) / kind.step_seconds, 4),
        "wait_ms_median": round(1000 * statistics.median(each), 4),
        "wait_ms_p99": round(1000 * sorted(each)[int(0.99 * len(each))], 4),
        "wait_ms_longest": round(1000 * max(each), 4),
    }


def _read_ms(folder: Path, plan: BatchPlan, cold: bool) -> float:
    """Of one rank's windows of a step, in the median."""
    windows, rng = Windows(open_dataset(folder), "train", plan.sequence_length), np.random.default_rng(1)
    times = []
    for _ in range(20):
        mine = rng.integers(0, len(windows), plan.windows_per_step // plan.world_size)
        if cold:
            _forget(folder)
        else:
            windows.read(mine)
        begun = time.perf_counter()
        windows.read(mine)
        times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times), 2)


def consume(folder: Path, plan: BatchPlan, rank: int, kind: Kind) -> list[float]:
    """Seconds that one rank waited for its data, each step's."""
    torch.set_num_threads(1)
    windows = Windows(open_dataset(folder), "train", plan.sequence_length)
    data = TrainingData(windows, plan, rank, 1337, torch.device("cpu"))
    if not kind.cold:
        for path in folder.iterdir():
            path.read_bytes()
    list(data.micro_batches(1))  # a run's first batch is waited for
    _compute(time.perf_counter() + kind.step_seconds, kind.launching)
    waits = []
    for batch in range(2, kind.steps + 2):
        if kind.cold:
            _forget(folder)
        waited, batches = 0.0, data.micro_batches(batch)
        for _ in range(plan.accumulation):
            begun = time.perf_counter()
            next(batches)
            ready = time.perf_counter()
            waited += ready - begun
            _compute(ready + kind.step_seconds / plan.accumulation, kind.launching)
        waits.append(waited)
    return waits


def _compute(until: float, launching: bool) -> None:
    small = torch.ones(64)
    while launching and time.perf_counter() < until:
        small = small * 1.0
    time.sleep(max(0.0, until - time.perf_counter()))


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main()
