"""Measure the time of ``status``.

    python benchmarks/status.py [--busy N] [--out FILE]

The files of a one-month run are generated: 95,365 records of 25 scalars, a thousand events, 15 checkpoints of sparse
files. Then the command is timed, including the start of Python and imports: alone, and beside N busy processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest, encode
from ds_gpt2.checkpoint.naming import MANIFEST, epoch_tag, rolling_tag
from ds_gpt2.engine.train_state import TrainState

PROJECT = Path(__file__).resolve().parents[1]
STEPS, STEP_SECONDS, EVERY, SCALARS = 95_365, 27.0, 250, 25
EPOCH_STEPS = STEPS // 5

CONFIG = """
run: {{name: month, dir: {folder}/runs}}
model: {{preset: 124M}}
data: {{dir: {folder}/data}}
schedule: {{steps: {steps}, warmup_steps: 715}}
checkpoint: {{dir: {folder}/checkpoints, every: {every}}}
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        run_dir = make_month(Path(name))
        results: dict[str, float] = {
            "busy_processes": options.busy,
            "records": STEPS,
            "metrics_mb": round((run_dir / "metrics.jsonl").stat().st_size / 1e6, 1),
            "journal_kb": round((run_dir / "journal.jsonl").stat().st_size / 1e3, 1),
        }
        results |= _timed("version", [], options.times)
        results |= _timed("status", [str(run_dir)], options.times)
        with _busy(options.busy):
            results |= _timed("status_while_busy", [str(run_dir)], options.times)
    report_result(options.out, results)


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--times", type=int, default=15, metavar="N", help="runs of each command")
    parser.add_argument("--busy", type=int, default=4, metavar="N", help="busy processes (default: 4)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    return parser.parse_args()


def make_month(folder: Path) -> Path:
    """Write the files of a run that has just completed its last step; return its directory."""
    run_dir = folder / "runs" / "month"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG.format(folder=folder, steps=STEPS, every=EVERY), encoding="utf-8")
    start_time = time.time() - STEPS * STEP_SECONDS
    _write_metrics(run_dir / "metrics.jsonl", start_time)
    _write_journal(run_dir / "journal.jsonl", start_time)
    for step in range((STEPS // EVERY - 9) * EVERY, STEPS, EVERY):
        _write_checkpoint(folder / "checkpoints" / "month" / rolling_tag(step), step)
    for epoch in range(1, 6):
        _write_checkpoint(folder / "checkpoints" / "month" / epoch_tag(epoch), epoch * EPOCH_STEPS)
    return run_dir


def _write_metrics(file: Path, start_time: float) -> None:
    rng = random.Random(0)
    names = ["train/loss", "train/epoch", "perf/tokens_per_s", "perf/gpu_temperature_c"]
    names += [f"perf/scalar_{number:02d}" for number in range(SCALARS - len(names))]
    with file.open("w", encoding="utf-8") as lines:
        for step in range(1, STEPS + 1):
            record = {"step": step, "time": round(start_time + step * STEP_SECONDS, 3)}
            record |= {name: round(rng.random(), 6) for name in names}
            record["train/epoch"] = round(step / EPOCH_STEPS, 9)
            record |= {"val/loss": 3.3 + rng.random() / 100} if step % EVERY == 0 else {}
            lines.write(json.dumps(record) + "\n")


def _write_journal(file: Path, start_time: float) -> None:
    """Write a thousand events: saves, every tenth the best, with a crash after every fortieth."""
    events = [(0, "start", 0)]
    for number, step in enumerate(range(EVERY, STEPS, STEPS // 850), start=1):
        events.append((step, "save", step))
        if number % 10 == 0:
            events.append((step, "best", step))
        if number % 40 == 0:
            events += [(step + 50, "crash", step + 50), (step + 52, "start", step)]
    with file.open("w", encoding="utf-8") as lines:
        for moment, kind, step in events:
            event = {
                "time": start_time + moment * STEP_SECONDS,
                "kind": kind,
                "step": step,
                "text": f"{kind} of step {step}",
            }
            lines.write(json.dumps(event) + "\n")


def _write_checkpoint(directory: Path, step: int) -> None:
    directory.mkdir(parents=True)
    files = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": 373_000_000 for rank in range(4)}
    for name, size in files.items():
        with (directory / name).open("wb") as file:
            file.truncate(size)
    manifest = Manifest(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        epoch=step / EPOCH_STEPS,
        state=TrainState(step=step, recent_losses=[3.0 + number / 997 for number in range(100)]).to_dict(),
        world_size=4,
        identity={},
        settings={},
        versions={},
        files={name: FileEntry(bytes=size, sha256="0" * 64) for name, size in files.items()},
    )
    (directory / MANIFEST).write_bytes(encode(manifest))


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    computing = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in computing:
            process.kill()
            process.wait()


def _timed(name: str, words: list[str], times: int) -> dict[str, float]:
    """Return the median and longest wall time in seconds, including the start of Python and imports."""
    program = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]
    command = [*program, "status", *words] if words else [*program, "--version"]
    seconds = []
    for _ in range(times):
        start_time = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        seconds.append(time.perf_counter() - start_time)
    return {f"{name}_seconds": round(statistics.median(seconds), 3), f"{name}_slowest": round(max(seconds), 3)}


if __name__ == "__main__":
    main()
