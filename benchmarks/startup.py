"""Measure how long a stopped run takes to train again: from the command to the first new step in its log.

    python benchmarks/startup.py --config quickstart --num_gpus 4 --out FILE
    python benchmarks/startup.py --config gpt2_124m --num_gpus 1 --out FILE data.dir=data/sample

A run is started, stopped by SIGTERM after some steps, and resumed several times by the command of ``launch.sh resume``.
With ``--cold`` the first start has cold caches: compiled kernels are written to an empty directory, which the following
starts use.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from ds_gpt2.config.settings import PROJECT_DIR

_POLL_SECONDS = 0.1  # polling uses processor time of the measured processes
_LIMIT_SECONDS = 300.0


def main() -> None:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--num_gpus", type=int, default=4)
    parser.add_argument("--starts", type=int, default=5, help="number of resumes")
    parser.add_argument("--cold", action="store_true", help="start without compiled kernels")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    report_result(options.out, result)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    environment = dict(os.environ)
    if options.cold:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    settings = [f"run.dir={folder}/runs", f"checkpoint.dir={folder}/checkpoints", "run.name=startup", *options.settings]
    train = ["train", options.config, "--num_gpus", str(options.num_gpus), *settings, "schedule.steps=100000"]
    run_dir = folder / "runs" / "startup"
    first = _start(train, run_dir, environment)
    resume = ["resume", str(run_dir), "--num_gpus", str(options.num_gpus)]
    again = [_start(resume, run_dir, environment) for _ in range(options.starts)]
    marks = {name: [each[name] for each in again] for name in first}
    return {
        "setting": f"{options.config}, {options.num_gpus} rank(s)",
        "first_start_s": first,
        "resumed_s": {name: round(statistics.median(values), 2) for name, values in marks.items()},
        "each": marks["first step"],
    }


def _start(command: list[str], run_dir: Path, environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds from the command to each event of one start, which is stopped afterwards."""
    log = run_dir / "train.log"
    before = log.stat().st_size if log.exists() else 0
    start_time = time.time()
    process = subprocess.Popen(
        [sys.executable, str(PROJECT_DIR / "ds_gpt2" / "__main__.py"), *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return _watched(process, log, before, start_time, command)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _watched(
    process: subprocess.Popen[bytes], log: Path, before: int, start_time: float, command: list[str]
) -> dict[str, float]:
    marks: dict[str, float] = {}
    checks = {
        "ranks started": lambda: _first_rank(process.pid),
        "model built": lambda: _logged(log, before, " parameters; "),
        "first step": lambda: _logged(log, before, " tok/s "),
    }
    while len(marks) < len(checks):
        if process.poll() is not None or time.time() - start_time > _LIMIT_SECONDS:
            raise SystemExit(f"no new step after {time.time() - start_time:.0f} s: {command}")
        for name, check in checks.items():
            if name not in marks and (when := check()) is not None:
                marks[name] = round(when - start_time, 2)
        time.sleep(_POLL_SECONDS)
    return marks


def _first_rank(supervisor: int) -> float | None:
    """Return the start time of the first rank's process, or None."""
    found = []
    for child in psutil.Process(supervisor).children(recursive=True):
        try:
            if any(word.startswith("--local_rank=") for word in child.cmdline()):
                found.append(child.create_time())
        except psutil.Error:
            continue
    return min(found) if found else None


def _logged(log: Path, before: int, words: str) -> float | None:
    """Return the current time if ``words`` are in the log after position ``before``; the log is not buffered."""
    if not log.exists():
        return None
    with log.open(encoding="utf-8") as lines:
        lines.seek(before)
        return time.time() if words in lines.read() else None


if __name__ == "__main__":
    main()
