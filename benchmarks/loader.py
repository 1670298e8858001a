"""Measure how long training waits for data.

    python benchmarks/loader.py [--ranks 4] [--played 2] [--tokens_per_s 2000000] [--steps 100] [--out FILE]

Shards of random tokens are written. Then processes read the micro-batches of their ranks, step by step, as training
does. Between two micro-batches they do what a GPU leaves to the processor: call small PyTorch operations without a
pause, as for launching kernels (``launching``), or sleep (``idle``, after which the processor's caches are cold). They
spend as much time on it as devices that train the given tokens per second on all ranks together. The wait is the time
until a micro-batch is available. ``read`` is the time to read the windows of a step, which happens concurrently.

``warm``: the shards are in the page cache. ``cold``: the page cache is dropped before every step, so that every window
is read from the disk. ``mixture_``: the same shards, distributed over three sources with shares of 50, 30 and 20%.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.program import make_parser, report_result
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.sections import DataSettings, SourceSettings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.shards import header_of
from ds_gpt2.data.sources import open_sources
from ds_gpt2.model.shape import VOCABULARY

SEQUENCE, MICRO_BATCH, TOKENS_PER_STEP = 1024, 16, 524_288  # GPT-2's

SHARES = (0.5, 0.3, 0.2)  # of the sources of the mixture


@dataclass(frozen=True)
class Kind:
    """How the steps are simulated."""

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
    processes = multiprocessing.get_context("spawn").Pool(options.played)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name, processes as pool:
        single, mixture = _write_shards(Path(name), options.shards, options.shard_tokens)
        for cache in ("warm", "cold"):
            results[f"{cache}_read_ms"] = _read_ms(single, plan, cache == "cold")
            for between, data in itertools.product(("launching", "idle"), (single, mixture)):
                kind = Kind(options.steps, step_seconds, cache == "cold", between == "launching")
                found = _measure(pool, [(data, plan, rank, kind) for rank in range(options.played)])
                label = f"{'mixture_' if data.mixture else ''}{cache}_{between}"
                results[label] = found
                print(label, json.dumps(found), flush=True)
    report_result(options.out, results)


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks that share the data (default: 4)")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--played",
        type=int,
        default=min(4, cores),
        metavar="N",
        help="ranks that are simulated (default: one per core)",
    )
    parser.add_argument(
        "--tokens_per_s", type=float, default=2_000_000, metavar="N", help="tokens per second of all ranks together"
    )
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of each kind (default: 100)")
    parser.add_argument("--shards", type=int, default=10, metavar="N", help="shards of 2 bytes per token (default: 10)")
    parser.add_argument(
        "--shard_tokens", type=int, default=100_000_000, metavar="N", help="tokens of a shard (default: 100 million)"
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="directory of the shards (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    return parser.parse_args()


def _write_shards(folder: Path, count: int, tokens: int) -> tuple[DataSettings, DataSettings]:
    """Write shards; return them as one dataset, and as the sources of a mixture (hard links to the same files)."""
    rng = np.random.default_rng(0)
    single, sources = folder / "single", [folder / f"source_{number}" for number in range(len(SHARES))]
    for directory in (single, *sources):
        directory.mkdir()
    for number in range(count):
        path = single / f"random_train_{number:06d}.bin"
        with path.open("wb") as file:
            file.write(header_of(tokens))
            file.write(rng.integers(0, VOCABULARY, tokens, np.uint16).tobytes())
            file.flush()
            os.fsync(file.fileno())  # only written pages can be dropped from the cache
        os.link(path, sources[number % len(sources)] / path.name)
    mixture = [SourceSettings(dir=directory, weight=share) for directory, share in zip(sources, SHARES, strict=True)]
    return DataSettings(dir=single), DataSettings(mixture=tuple(mixture))


def _measure(pool: Pool, ranks: list[tuple[DataSettings, BatchPlan, int, Kind]]) -> dict[str, float]:
    """Return the share of time spent waiting over all ranks and steps, and statistics of the waits per step in ms.

    Args:
        pool: has one process per rank.
        ranks: the arguments of ``consume`` for each rank.
    """
    waits = pool.starmap(consume, ranks, chunksize=1)
    kind = ranks[0][-1]
    each = [wait for rank in waits for wait in rank]
    return {
        "wait_percent": round(100 * statistics.mean(each) / kind.step_seconds, 4),
        "wait_ms_median": round(1000 * statistics.median(each), 4),
        "wait_ms_p99": round(1000 * sorted(each)[int(0.99 * len(each))], 4),
        "wait_ms_longest": round(1000 * max(each), 4),
    }


def _read_ms(data: DataSettings, plan: BatchPlan, cold: bool) -> float:
    """Return the median time in ms to read one rank's windows of a step."""
    windows, rng = open_sources(data).windows("train", plan.sequence_length), np.random.default_rng(1)
    times = []
    for _ in range(20):
        mine = rng.integers(0, len(windows), plan.windows_per_step // plan.world_size)
        if cold:
            _drop_cache(data)
        else:
            windows.read(mine)
        start_time = time.perf_counter()
        windows.read(mine)
        times.append(1000 * (time.perf_counter() - start_time))
    return round(statistics.median(times), 2)


def consume(settings: DataSettings, plan: BatchPlan, rank: int, kind: Kind) -> list[float]:
    """Return the seconds that one rank waited for its data in each step."""
    torch.set_num_threads(1)
    sources = open_sources(settings)
    mixture = sources.mixture(plan.sequence_length, plan.windows_per_step, 1337)
    windows = sources.windows("train", plan.sequence_length)
    data = TrainingData(windows, plan, rank, 1337, torch.device("cpu"), mixture)
    if not kind.cold:
        for path in _files(settings):
            path.read_bytes()
    list(data.micro_batches(1))  # the first batch of a run is not prefetched
    _compute(time.perf_counter() + kind.step_seconds, kind.launching)
    waits = []
    for batch in range(2, kind.steps + 2):
        if kind.cold:
            _drop_cache(settings)
        waited, batches = 0.0, data.micro_batches(batch)
        for _ in range(plan.accumulation):
            start_time = time.perf_counter()
            next(batches)
            ready = time.perf_counter()
            waited += ready - start_time
            _compute(ready + kind.step_seconds / plan.accumulation, kind.launching)
        waits.append(waited)
    return waits


def _compute(until: float, launching: bool) -> None:
    small = torch.ones(64)
    while launching and time.perf_counter() < until:
        small = small * 1.0
    time.sleep(max(0.0, until - time.perf_counter()))


def _files(data: DataSettings) -> list[Path]:
    return [path for source in data.sources for path in source.dir.iterdir()]


def _drop_cache(data: DataSettings) -> None:
    for path in _files(data):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main()
