"""Compare the predictions of ``plan`` with real runs, which are trained to the end.

    python benchmarks/plan_accuracy.py --data data/sample --out benchmarks/results/plan_accuracy_cpu.json

Measured of a real run: the peak resident memory of any rank (VmHWM), the peak and final bytes of its checkpoints (hard
links count once), the bytes of its other files, the mean step time, and the peak of its tensors (``tensor_peak.py``,
four steps).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import measured_rank
from benchmarks.program import make_parser, report_result
from ds_gpt2.common.disk_usage import bytes_below
from ds_gpt2.config.settings import PROJECT_DIR, load_settings
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.supervision.launcher import RankLayout, Ranks, start_command
from ds_gpt2.tools.plan import trial_rank

_CONFIG = PROJECT_DIR / "ds_configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    overrides: dict[str, str]


_CASES = (
    Case("quickstart", 4, {}),
    Case(
        "dropout, accumulation, best as weights",
        2,
        {
            "model.dropout": "0.1",
            "batch.micro_batch": "4",
            "batch.tokens_per_step": "4096",
            "schedule.steps": "120",
            "checkpoint.every": "20",
            "checkpoint.keep_last": "2",
            "checkpoint.best_as": "weights",
            "validation.every": "20",
            "histograms.every": "40",
        },
    ),
    Case(
        "30M",
        2,
        {
            "model.preset": "30M",
            "schedule.steps": "60",
            "checkpoint.every": "20",
            "validation.every": "20",
            "samples.every": "30",
            "histograms.every": "30",
        },
    ),
)


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    options = parser.parse_args()
    found = {}
    for case in _CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = _compare(case, options.data, Path(folder))
        print(case.name, json.dumps(found[case.name], indent=1), flush=True)
    report_result(options.out, {"runs": found}, "runs")


def _compare(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    overrides = {
        "data.dir": str(data.absolute()),
        "run.dir": str(folder / "runs"),
        "checkpoint.dir": str(folder / "checkpoints"),
        "checkpoint.min_free_gb": "0",
        **case.overrides,
    }
    planned, quick = (_plan(case.ranks, overrides, *words) for words in ((), ("--quick",)))
    real = train_to_the_end(_CONFIG, case.ranks, overrides, folder)
    tensors = _tensor_peak(case.ranks, data, case.overrides, folder)
    figures = {
        "rank memory, bytes": (planned["rank_memory_bytes"], real["rank_memory"]),
        "rank memory without a trial, bytes": (quick["rank_memory_bytes"], real["rank_memory"]),
        "tensors, bytes": (tensors["predicted"], tensors["measured"]),
        "checkpoints at most, bytes": (planned["checkpoints_most_bytes"], real["checkpoints_most"]),
        "checkpoints at the end, bytes": (planned["checkpoints_at_end_bytes"], real["checkpoints_at_end"]),
        "checkpoints at most without a trial, bytes": (quick["checkpoints_most_bytes"], real["checkpoints_most"]),
        "logs, bytes": (planned["logs_bytes"], real["logs"]),
        "a step, s": (planned["step_seconds"], real["step"]),
        "the whole run, s": (planned["run_seconds"], real["seconds"]),
    }
    return {
        name: {"predicted": predicted, "used": used, "off": f"{100 * (predicted / used - 1):+.1f}%"}
        for name, (predicted, used) in figures.items()
    }


def _plan(ranks: int, overrides: dict[str, str], *words: str) -> dict[str, float]:
    settings = [f"{key}={value}" for key, value in overrides.items()]
    command = [
        sys.executable,
        "-m",
        "ds_gpt2",
        "plan",
        str(_CONFIG),
        f"--num_gpus={ranks}",
        "--json",
        *words,
        *settings,
    ]
    done = subprocess.run(command, cwd=PROJECT_DIR, check=True, capture_output=True, text=True)
    return {name: figure["value"] for name, figure in json.loads(done.stdout)["figures"].items()}


def train_to_the_end(config: Path, ranks: int, overrides: dict[str, str], folder: Path) -> dict[str, float]:
    """Train a whole run whose ranks record their memory in ``folder``, as those of a trial do; return its figures."""
    settings = load_settings(config, overrides)
    arguments = ["--config", str(config), *(f"{key}={value}" for key, value in overrides.items())]
    start_time, environment = time.time(), measured_rank.request(settings.checkpoint_dir, folder)
    started = Ranks(arguments, RankLayout("cpu", ranks), folder / "outcome", environment, script=measured_rank.SCRIPT)
    try:
        while not started.have_exited:
            time.sleep(0.1)
    finally:
        started.kill()
    if (code := started.outcome().code) != 0:
        raise RuntimeError(f"the run ended with exit code {code}")
    records = list(read_metrics(settings.run_dir / METRICS))
    return {
        "rank_memory": max(trial_rank.read_record(folder, rank).resident for rank in range(ranks)),
        "checkpoints_most": measured_rank.most_bytes(folder, ranks),
        "checkpoints_at_end": bytes_below(settings.checkpoint_dir),
        "logs": bytes_below(settings.run_dir),
        "step": round(statistics.fmean(record["perf/step_ms"] for record in records) / 1000, 4),
        "seconds": round(records[-1]["time"] - start_time, 1),
    }


def _tensor_peak(ranks: int, data: Path, overrides: dict[str, str], folder: Path) -> dict[str, Any]:
    out = folder / "tensors.json"
    program = Path(__file__).with_name("tensor_peak.py")
    settings = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    command = start_command(RankLayout("cpu", ranks), program, ["--data", str(data), "--out", str(out), *settings])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
