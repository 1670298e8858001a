"""Train with the code of an earlier commit, resume with this one, and compare with a run that never stopped.

    python benchmarks/compatibility.py --commit b448271 --out benchmarks/results/compatibility.json

The earlier commit is checked out into a temporary directory and trains the first half of a small run on two ranks,
with validation, samples and histograms. This commit resumes that run's directory and trains the second half. Curves,
weights, moments, random states and the ledger of windows must equal, bit for bit, those of a run that the earlier
commit trains to the end without a stop: the interruption and the change of the code leave no trace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.program import make_parser, report
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Source, python_documents
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

PROJECT = Path(__file__).resolve().parents[1]
STEPS, SEQUENCE = 40, 32


def main() -> int:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--commit", required=True, help="the earlier commit")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compatibility-"))
    earlier = folder / "earlier"
    subprocess.run(["git", "-C", PROJECT, "worktree", "add", "--detach", earlier, options.commit], check=True)
    try:
        data = _prepare(folder / "data")
        uninterrupted = _write_config(folder / "uninterrupted", data)
        _train(earlier, uninterrupted)
        interrupted = _write_config(folder / "interrupted", data)
        _train(earlier, interrupted, f"schedule.steps={STEPS}", stop_at=STEPS // 2)
        _train(PROJECT, interrupted, "--resume")
        problems = _differences(folder / "uninterrupted", folder / "interrupted")
    finally:
        subprocess.run(["git", "-C", PROJECT, "worktree", "remove", "--force", earlier], check=True)
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "earlier_commit": _resolve(options.commit),
        "commit": _resolve("HEAD"),
        "steps": STEPS,
        "stopped_at": STEPS // 2,
        "differences": problems,
    }
    report(options.out, result)
    return 1 if problems else 0


def _prepare(directory: Path) -> Path:
    """Prepare a dataset of some 100,000 tokens from the documentation of Python's standard library."""
    source = Source("compatibility", [Listed("manual", lambda: iter(list(python_documents())[:60]))])
    prepare(source, directory, Recipe(EveryPiece(20)), workers=1)
    return directory


def _write_config(folder: Path, data: Path) -> Path:
    folder.mkdir()
    settings = {
        "run": {"name": "test", "dir": str(folder / "runs"), "device": "cpu"},
        "model": {"layers": 2, "heads": 2, "width": 32, "dropout": 0.1},
        "data": {"dir": str(data)},
        "batch": {"tokens_per_step": 8 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE},
        "schedule": {"steps": STEPS, "warmup_steps": 5},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": 10},
        "validation": {"every": 10, "tokens": 20 * SEQUENCE},
        "samples": {"every": 10, "prompts": ["The statement"], "tokens": 8},
        "histograms": {"every": 10},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


def _train(project: Path, config: Path, *arguments: str, stop_at: int | None = None) -> None:
    """Train with the code in ``project`` on two ranks, to the end or until a stop file ends it after ``stop_at``."""
    command = [sys.executable, "-m", "deepspeed.launcher.launch"]
    world = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, in base 64
    command += [f"--world_info={world}", f"--master_port={_free_port()}", "--master_addr=127.0.0.1"]
    command += [str(project / "ds_gpt2" / "train.py"), "--config", str(config), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=project)
    run_dir = config.parent / "runs" / "test"
    while process.poll() is None:
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            steps = [record["step"] for record in read_metrics(run_dir / METRICS)]
            checkpoint = config.parent / "checkpoints" / "test" / rolling_tag(stop_at or 0)
            if stop_at is not None and (checkpoint.is_dir() or max(steps, default=0) >= stop_at):
                (run_dir / "STOP").touch()
    print(f"{project.name}: exit code {process.returncode}", flush=True)


def _free_port() -> int:
    from ds_gpt2.common.host import free_port

    return free_port()


def _differences(uninterrupted: Path, interrupted: Path) -> list[str]:
    checkpoints = [folder / "checkpoints" / "test" / rolling_tag(STEPS) for folder in (uninterrupted, interrupted)]
    curves = [folder / "runs" / "test" for folder in (uninterrupted, interrupted)]
    return [*curve_differences(*curves), *checkpoint_differences(*checkpoints)]


def _resolve(commit: str) -> str:
    command = ["git", "-C", str(PROJECT), "rev-parse", "--short", commit]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
