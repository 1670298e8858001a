"""Compare tokens per second, memory and losses of ds_gpt2 and a plain PyTorch DDP loop on four gloo ranks.

Both arms train the same model on the same windows, alternating in one run. The first steps of each block do not count.

    python benchmarks/throughput.py --data data/sample --out benchmarks/results/throughput_cpu.json
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

import psutil

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import PROJECT_DIR, Settings, dump_settings, load_settings
from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command

OURS, COMPILED, PLAIN = "ds_gpt2", "ds_gpt2, compiled", "plain DDP"
WARM_UP = 5  # steps of each block that are not counted
RANKS = 4


@dataclass(frozen=True)
class Block:
    """The result of one start of one arm."""

    losses: list[float]
    seconds: list[float]  # per step
    peak_bytes: list[int]  # resident, per rank


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps per block")
    parser.add_argument("--curve", type=int, default=100, help="steps of the first round, for the comparison of losses")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(options.data, Path(folder), options.curve)
        blocks: dict[str, list[Block]] = {arm: [] for arm in (OURS, COMPILED, PLAIN)}
        for number in range(options.rounds):
            steps = options.curve if number == 0 else options.steps
            blocks[OURS].append(_run_ours(settings, f"ours{number}", steps, RANKS))
            blocks[COMPILED].append(_run_ours(settings, f"compiled{number}", steps, RANKS, "run.compile=true"))
            blocks[PLAIN].append(_run_plain(settings, steps))
            rates = ", ".join(f"{arm} {_rate(settings, each[-1]):,.0f}" for arm, each in blocks.items())
            print(f"round {number + 1}, tokens/s: {rates}", flush=True)
        fewer = _run_ours(settings, "fewer", options.curve, RANKS // 2)
    report_result(options.out, _summary(settings, blocks, fewer), "curves")


def _settings(data: Path, folder: Path, steps: int) -> Settings:
    """Return the settings of goal S3: 7 M parameters, 8,192 tokens per step."""
    return load_settings(
        PROJECT_DIR / "ds_configs" / "quickstart.yaml",
        {
            "data.dir": str(data.absolute()),
            "run.dir": str(folder / "runs"),
            "checkpoint.dir": str(folder / "checkpoints"),
            "run.device": "cpu",
            "batch.tokens_per_step": "8192",
            "schedule.steps": str(steps),
            "schedule.warmup_steps": "10",
            "schedule.max_lr": "1e-3",  # a stable rate, because losses are compared
            "schedule.min_lr": "1e-4",
            "checkpoint.every": "0",
            "validation.every": "0",
            "samples.every": "0",
        },
    )


def _run_ours(settings: Settings, name: str, steps: int, ranks: int, *words: str) -> Block:
    config = _write(settings, name)
    train = ["--config", str(config), f"schedule.steps={steps}", f"run.name={name}", *words]
    command = start_command(RankLayout("cpu", ranks), TRAIN, train)
    peaks = _run(command, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, "train.py")
    lines = (settings.run.dir / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return Block(
        [record["train/loss"] for record in records], [record["perf/step_ms"] / 1000 for record in records], peaks
    )


def _run_plain(settings: Settings, steps: int) -> Block:
    config = _write(settings, "plain")
    out = config.with_suffix(".json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    program = [str(Path(__file__).with_name("reference.py")), str(config), "--steps", str(steps), "--out", str(out)]
    peaks = _run([*launcher, "--master_port", str(free_port()), *program], {"OMP_NUM_THREADS": "1"}, "reference.py")
    content = json.loads(out.read_text(encoding="utf-8"))
    return Block(content["losses"], content["seconds"], peaks)


def _write(settings: Settings, name: str) -> Path:
    settings.run.dir.mkdir(parents=True, exist_ok=True)
    path = settings.run.dir / f"{name}.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    return path


def _run(command: list[str], environment: dict[str, str], program: str) -> list[int]:
    """Run ``command``; return the peak resident bytes of every process that runs ``program``."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                words = child.cmdline()
                if len(words) > 2 and words[2].endswith(program):
                    status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                    peaks[child.pid] = int(line.split()[1]) * 1024
            except (psutil.Error, OSError, StopIteration):
                continue  # it has just ended
        time.sleep(1.0)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return sorted(peaks.values())


def _rate(settings: Settings, block: Block) -> float:
    return settings.batch.tokens_per_step / statistics.median(block.seconds[WARM_UP:])


def _summary(settings: Settings, blocks: dict[str, list[Block]], fewer: Block) -> dict[str, Any]:
    first = {arm: each[0].losses for arm, each in blocks.items()}
    return {
        "setting": f"7 M parameters, T={settings.batch.sequence_length}, micro-batch {settings.batch.micro_batch},"
        f" {settings.batch.tokens_per_step} tokens a step, {RANKS} gloo ranks, 1 thread each",
        "tokens_per_s": {arm: _rates(settings, each) for arm, each in blocks.items()},
        "against plain DDP": {arm: _ratio(settings, blocks[arm], blocks[PLAIN]) for arm in (OURS, COMPILED)},
        "peak_resident_mb_per_rank": {arm: _megabytes(each) for arm, each in blocks.items()},
        "loss_differences": {
            "ds_gpt2 - plain DDP": _differences(first[OURS], first[PLAIN]),
            "compiled - plain DDP": _differences(first[COMPILED], first[PLAIN]),
            f"ds_gpt2 on {RANKS} - on {RANKS // 2} ranks (bf16 noise)": _differences(first[OURS], fewer.losses),
        },
        "curves": {**first, "ds_gpt2 on 2 ranks": fewer.losses},
    }


def _ratio(settings: Settings, ours: list[Block], plain: list[Block]) -> dict[str, Any]:
    ratios = [_rate(settings, one) / _rate(settings, other) for one, other in zip(ours, plain, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 3) for ratio in ratios]}


def _rates(settings: Settings, blocks: list[Block]) -> dict[str, Any]:
    rates = [_rate(settings, block) for block in blocks]
    return {"median": round(statistics.median(rates)), "rounds": [round(rate) for rate in rates]}


def _megabytes(blocks: list[Block]) -> int:
    return round(max(max(block.peak_bytes) for block in blocks) / 2**20)


def _differences(first: list[float], second: list[float]) -> dict[str, float]:
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    return {
        "mean_absolute": round(statistics.fmean(map(abs, gaps)), 5),
        "largest": round(max(map(abs, gaps)), 5),
        "mean_of_last_20": round(statistics.fmean(gaps[-20:]), 5),
        "final_loss": round(statistics.fmean(first[-20:]), 4),
    }


if __name__ == "__main__":
    main()
