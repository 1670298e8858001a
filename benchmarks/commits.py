"""Compare the speed of two commits: starts of the same run, turn by turn, so that both see the same machine.

    python benchmarks/commits.py --commit cc6cab6 --data data/sample --out benchmarks/results/commits_cpu.json

Each round starts the code of the earlier commit and of this one, on four gloo ranks by default, for ``--steps`` steps
without evaluation and saving. Throughput is the median of the steps after ``--warm_up``; the time to the first step
is measured from the start of the launcher to the first line of a step in its output.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.program import make_parser, report_result
from benchmarks.runs import checked_out, start_ranks, steps_only
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

_POLL_SECONDS = 0.1
_TOKENS = 8192  # of a step


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--commit", required=True, help="the earlier commit")
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm_up", type=int, default=8)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="commits-") as folder,
        checked_out(options.commit, Path(folder) / "earlier") as earlier,
    ):
        rounds = [_round(earlier, Path(folder) / str(number), options) for number in range(options.rounds)]
    setting = f"{options.preset}, {options.ranks} ranks, {_TOKENS} tokens a step"
    report_result(options.out, {"setting": setting, **_summary(rounds)})


def _round(earlier: Path, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run both commits once; the order changes from round to round."""
    arms = {"earlier": earlier, "this": PROJECT_DIR}
    order = sorted(arms, reverse=int(folder.name) % 2 == 1)
    return {name: _run(arms[name], folder / name, options) for name in order}


def _run(project: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    overrides = {
        "batch.micro_batch": 2,
        "batch.sequence_length": 256,
        "batch.tokens_per_step": _TOKENS,
        "schedule.steps": options.steps,
        "schedule.warmup_steps": 4,
    }
    settings = steps_only(folder, options.data, options.preset, **overrides)
    folder.mkdir(parents=True)
    config = folder / "empty.yaml"
    config.write_text("{}\n", encoding="utf-8")
    arguments = ["--config", str(config), *(f"{key}={value}" for key, value in settings.items())]
    metrics = folder / "runs" / "run" / METRICS
    start, first_step = time.monotonic(), math.nan
    with (folder / "output").open("w") as output:
        process = start_ranks(project, options.ranks, arguments, stdout=output, stderr=output)
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if math.isnan(first_step) and re.search(r"^step +1/", (folder / "output").read_text(), re.MULTILINE):
                first_step = time.monotonic() - start
    if process.returncode:
        raise SystemExit((folder / "output").read_text())
    seconds = [record["perf/step_ms"] / 1000 for record in read_metrics(metrics)][options.warm_up :]
    shutil.rmtree(folder)
    return {"tokens_per_s": _TOKENS / statistics.median(seconds), "first_step_s": first_step}


def _summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"rounds": rounds}
    for figure in ("tokens_per_s", "first_step_s"):
        ratios = [each["this"][figure] / each["earlier"][figure] for each in rounds]
        result[figure] = {
            "earlier_median": round(statistics.median(each["earlier"][figure] for each in rounds), 2),
            "this_median": round(statistics.median(each["this"][figure] for each in rounds), 2),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
    return result


if __name__ == "__main__":
    main()
