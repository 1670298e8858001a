"""Test the watchdog: thousands of steps without false alarms, then stopped ranks that must be detected.

    python benchmarks/watch_soak.py --data data/sample --steps 10000 --stops 5 --out FILE

A tiny GPT-2 trains under the real supervisor, with all evaluations and regular saves, and with a much shorter timeout
than the default: a step may take ``--seconds``. Meanwhile, the journal must record nothing but the start, saves and the
end. Then ranks are stopped (SIGSTOP) at random times: each must be detected in time, with the stacks of all ranks, and
the run must be restarted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.program import make_parser, report_result
from benchmarks.runs import write_config
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir.journal import KINDS
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.drill.run_process import RunProcess, end_all
from ds_gpt2.tools.drill.scenes.processes import freeze_rank
from ds_gpt2.tools.drill.scenes.scene import SceneContext
from ds_gpt2.tools.drill.shrink import EVERY

_QUIET = ("launch", "start", "save", "best", "done")  # events of a healthy run


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = _run_process(Path(folder), options)
        try:
            result = _soak(run, options)
        finally:
            end_all(run.mark)
    report_result(options.out, result)


def _soak(run: RunProcess, options: argparse.Namespace) -> dict[str, Any]:
    run.start(f"schedule.steps={options.steps}")
    run.wait_done()
    records = list(read_metrics(run.run_dir / METRICS))
    events = Counter(event.kind for event in run.events(0, *KINDS))
    steps = [record["perf/step_ms"] for record in records]
    quiet = {
        "ranks": options.ranks,
        "steps": len(records),
        "patience_seconds": options.seconds,
        "step_ms": {"median": round(statistics.median(steps), 1), "longest": round(max(steps), 1)},
        "told": dict(events),
        "false_alarms": sum(count for kind, count in events.items() if kind not in _QUIET),
    }
    print(json.dumps(quiet), flush=True)
    context = SceneContext(run, run, random.Random(options.seed), run.run_dir)
    run.start(f"checkpoint.every={EVERY}")
    stops = [_stop_one(context) for _ in range(options.stops)]
    run.interrupt()
    run.wait_end()
    return {**quiet, "stops": stops}


def _stop_one(context: SceneContext) -> dict[str, Any]:
    """
    Raises:
        FailedError: it was not detected in time, or the run did not continue.
    """
    since = context.run.journal_position()
    recovery = freeze_rank(context)
    (hang,) = context.run.events(since, "hang")
    print(recovery.text, flush=True)
    return {"what": hang.text, "done": recovery.text, "going_on_after_seconds": round(recovery.lost_seconds, 1)}


def _run_process(folder: Path, options: argparse.Namespace) -> RunProcess:
    config = write_config(
        folder,
        options.data.absolute(),
        "soak",
        batch={"tokens_per_step": 16 * options.ranks, "micro_batch": 1, "sequence_length": 16},
        schedule={"steps": 10**6, "warmup_steps": 100},
        checkpoint={"every": 250, "keep_last": 2, "min_free_gb": 0},
        validation={"every": 250, "tokens": 1024},
        samples={"every": 1000, "tokens": 8},
        histograms={"every": 1000},
        supervisor={"hang_seconds": options.seconds, "backoff_seconds": 0.5},
    )
    settings = load_settings(config)
    layout = RankLayout("cpu", options.ranks)
    return RunProcess(config, settings, layout, folder / "output.txt", str(folder), timeout=300)


if __name__ == "__main__":
    main()
