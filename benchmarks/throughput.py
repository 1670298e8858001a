"""Tokens per second, memory and loss curve of ds_gpt2 beside a plain PyTorch DDP loop, on four gloo ranks.

Both arms train the same model on the same windows, turn by turn in one run. A block's first steps are not counted.

    python benchmarks/throughput.py --data data/sample --out benchmarks/results/throughput_cpu.json
"""

from __future__ import annotations

import argparse
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

from benchmarks import machine
from ds_gpt2.config import PROJECT_DIR, Settings, dump_settings, load_settings
from ds_gpt2.machine import free_port

WARM_UP = 5  # steps of each block that are not counted
RANKS = 4


@dataclass(frozen=True)
class Block:
    """One start of one arm."""

    losses: list[float]
    seconds: list[float]  # per step
    peak_bytes: list[int]  # resident, per rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of each block")
    parser.add_argument("--curve", type=int, default=100, help="steps of the first round, whose losses are compared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(options.data, Path(folder), options.curve)
        ours, plain = [], []
        for number in range(options.rounds):
            steps = options.curve if number == 0 else options.steps
            ours.append(_run_ours(settings, f"ours{number}", steps, RANKS))
            plain.append(_run_plain(settings, steps))
            print(
                f"round {number + 1}: {_rate(settings, ours[-1]):,.0f} against {_rate(settings, plain[-1]):,.0f} tok/s"
            )
        fewer = _run_ours(settings, "fewer", options.curve, RANKS // 2)
    result = _summary(settings, ours, plain, fewer)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=1))


def _settings(data: Path, folder: Path, steps: int) -> Settings:
    """Goal S3's model: 7 M parameters, 8,192 tokens a step."""
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
            "schedule.max_lr": "1e-3",  # well inside what is stable: the curves are compared
            "schedule.min_lr": "1e-4",
            "checkpoint.every": "0",
            "validation.every": "0",
            "samples.every": "0",
        },
    )


def _run_ours(settings: Settings, name: str, steps: int, ranks: int) -> Block:
    config = _write(settings, name)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    train = [str(PROJECT_DIR / "ds_gpt2" / "train.py"), "--config", str(config), f"schedule.steps={steps}"]
    command = [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), *train, f"run.name={name}"]
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
    """Run to the end; the peak resident bytes of every process that runs ``program``, read from outside."""
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
                continue  # it ended while we looked
        time.sleep(1.0)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return sorted(peaks.values())


def _rate(settings: Settings, block: Block) -> float:
    return settings.batch.tokens_per_step / statistics.median(block.seconds[WARM_UP:])


def _summary(settings: Settings, ours: list[Block], plain: list[Block], fewer: Block) -> dict[str, Any]:
    ratios = [_rate(settings, one) / _rate(settings, other) for one, other in zip(ours, plain, strict=True)]
    noise = _differences(ours[0].losses, fewer.losses)
    return {
        "machine": machine.describe(),
        "setting": f"7 M parameters, T={settings.batch.sequence_length}, micro-batch {settings.batch.micro_batch},"
        f" {settings.batch.tokens_per_step} tokens a step, {RANKS} gloo ranks, 1 thread each",
        "tokens_per_s": {"ds_gpt2": _rates(settings, ours), "plain DDP": _rates(settings, plain)},
        "ratio": {"median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 3) for ratio in ratios]},
        "peak_resident_mb_per_rank": {"ds_gpt2": _megabytes(ours), "plain DDP": _megabytes(plain)},
        "loss_differences": {
            "ds_gpt2 - plain DDP": _differences(ours[0].losses, plain[0].losses),
            f"ds_gpt2 on {RANKS} - on {RANKS // 2} ranks (bf16 noise)": noise,
        },
        "curves": {"ds_gpt2": ours[0].losses, "plain DDP": plain[0].losses, "ds_gpt2 on 2 ranks": fewer.losses},
    }


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
