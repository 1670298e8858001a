"""Measure tokens per second of a real run of train.py, with loader, clipping, logging and TensorBoard.

    python benchmarks/training_run.py --num_gpus 1 --steps 350 --data data/sample --out FILE

Evaluation and checkpoints are disabled; monitor_overhead.py and checkpoint_stall.py measure them. With one GPU, a step
has as many tokens as one of four GPUs processes of 524,288.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from benchmarks.runs import steps_only
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir.metrics import METRICS, read_metrics


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--preset", default="124M")
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens per step and rank")
    parser.add_argument("--warm_up", type=int, default=50, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report_result(options.out, _run(options, Path(folder)))


def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    overrides = {
        "batch.micro_batch": options.micro_batch,
        "batch.sequence_length": options.sequence_length,
        "batch.tokens_per_step": options.tokens * options.num_gpus,
        "schedule.steps": options.steps,
        "schedule.warmup_steps": min(100, options.steps - 1),
    }
    settings = steps_only(folder, options.data, options.preset, **overrides)
    words = [f"{name}={value}" for name, value in settings.items()] + options.settings
    program = str(PROJECT_DIR / "ds_gpt2" / "__main__.py")
    subprocess.run(
        [sys.executable, program, "train", "gpt2_124m", "--num_gpus", str(options.num_gpus), *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    records = list(read_metrics(folder / "runs" / "run" / METRICS))[options.warm_up :]
    rates = [record["perf/tokens_per_s"] for record in records]
    quartiles = statistics.quantiles(rates, n=4)
    return {
        "setting": f"{options.preset}, {settings['batch.tokens_per_step']:,} tokens a step on {options.num_gpus}",
        "steps": len(records),
        "tokens_per_s": {"median": round(quartiles[1]), "quartiles": [round(quartiles[0]), round(quartiles[2])]},
        "mfu": _median(records, "perf/mfu"),
        "step_ms": _median(records, "perf/step_ms"),
        "data_ms": _median(records, "perf/data_ms"),
        "forward_backward_ms": _median(records, "perf/forward_backward_ms"),
        "update_ms": _median(records, "perf/update_ms"),
        "slowest_step_ms": round(max(record["perf/step_ms"] for record in records), 1),
        "loss": [records[0]["train/loss"], records[-1]["train/loss"]],
        "gpu_memory_gb": max((record.get("perf/gpu_memory_gb", 0.0) for record in records), default=0.0),
        "gpu_power_w": _median(records, "perf/gpu_power_w"),
    }


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return round(statistics.median(values), 4) if values else None


if __name__ == "__main__":
    main()
