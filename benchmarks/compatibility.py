"""Train with the code of an earlier commit, resume with this one, and compare with a run that never stopped.

    python benchmarks/compatibility.py --commit b448271 --out benchmarks/results/compatibility.json

The earlier commit is checked out into a temporary directory and trains the first half of a small run on two ranks,
with validation, samples and histograms. This commit resumes that run's directory and trains the second half. Curves,
weights, moments, random states and the ledger of windows must equal, bit for bit, those of a run that the earlier
commit trains to the end without a stop: the interruption and the change of the code leave no trace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.program import make_parser, report_result
from benchmarks.runs import checked_out, prepare_manual, start_ranks, write_config
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

STEPS, SEQUENCE = 40, 32


def main() -> int:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--commit", required=True, help="the earlier commit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compatibility-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with checked_out(options.commit, folder / "earlier") as earlier:
            data = prepare_manual(folder / "data", 0, 60, held_out=20)
            uninterrupted = _write_config(folder / "uninterrupted", data)
            _train(earlier, uninterrupted)
            interrupted = _write_config(folder / "interrupted", data)
            _train(earlier, interrupted, f"schedule.steps={STEPS}", stop_at=STEPS // 2)
            _train(PROJECT_DIR, interrupted, "--resume")
            problems = _differences(folder / "uninterrupted", folder / "interrupted")
    result = {
        "earlier_commit": _resolve(options.commit),
        "commit": _resolve("HEAD"),
        "steps": STEPS,
        "stopped_at": STEPS // 2,
        "differences": problems,
    }
    report_result(options.out, result)
    return 1 if problems else 0


def _write_config(folder: Path, data: Path) -> Path:
    return write_config(
        folder,
        data,
        "test",
        model={"dropout": 0.1},
        batch={"tokens_per_step": 8 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE},
        schedule={"steps": STEPS, "warmup_steps": 5},
        checkpoint={"every": 10},
        validation={"every": 10, "tokens": 20 * SEQUENCE},
        samples={"every": 10, "prompts": ["The statement"], "tokens": 8},
        histograms={"every": 10},
    )


def _train(project: Path, config: Path, *arguments: str, stop_at: int | None = None) -> None:
    """Train with the code in ``project`` on two ranks, to the end or until a stop file ends it after ``stop_at``."""
    process = start_ranks(project, 2, ["--config", str(config), *arguments])
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


def _differences(uninterrupted: Path, interrupted: Path) -> list[str]:
    checkpoints = [folder / "checkpoints" / "test" / rolling_tag(STEPS) for folder in (uninterrupted, interrupted)]
    curves = [folder / "runs" / "test" for folder in (uninterrupted, interrupted)]
    return [*curve_differences(*curves), *checkpoint_differences(*checkpoints)]


def _resolve(commit: str) -> str:
    command = ["git", "-C", str(PROJECT_DIR), "rev-parse", "--short", commit]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
