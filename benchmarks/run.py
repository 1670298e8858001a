"""Measure the figures of docs/performance.md: run a suite of benchmarks and print a table of goals.

    python benchmarks/run.py --suite cpu --data data/sample --text FILES --hellaswag FILE --out DIR
    python benchmarks/run.py --suite gpu --data data/sample --hellaswag FILE --out DIR         takes ten minutes

The results of each program and the table are written to DIR as JSON. With ``--toy`` the GPU programs run with tiny
models on any machine, to check that they work; the table then has no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import psutil

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from benchmarks.program import make_parser
from ds_gpt2.supervision.launcher import RankLayout, start_command

Found = dict[str, Any]  # the results of a program


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    name: str
    what: str
    target: float
    unit: str
    read: Callable[[Found], float]
    at_most: bool = False  # lower is better

    def ratio(self, value: float) -> float:
        """Return measured / required, or the inverse if lower is better: the goal is reached from 1 on."""
        return self.target / value if self.at_most else value / self.target


@dataclass(frozen=True)
class Program:
    file: str
    words: Sequence[object]
    goals: Sequence[Goal] = ()
    ranks: int = 0  # to launch with DeepSpeed; 0: a plain process
    limit: float = 240.0  # seconds
    toy: Sequence[object] = ()  # replaces ``words`` with --toy

    @property
    def name(self) -> str:
        return self.file.removesuffix(".py")


BYTES = Goal("S9", "a checkpoint", 1.01 * 14, "bytes a parameter", lambda it: it["bytes_per_parameter"], at_most=True)
MONITORING = (
    Goal("S5", "scalars of every step", 0.1, "%", lambda it: 100 * it["scalars_share_of_the_time"], at_most=True),
    Goal("S5", "all monitoring", 1.0, "%", lambda it: _monitoring_share(it), at_most=True),
)


def gpu_suite(options: argparse.Namespace) -> list[Program]:
    data, small = ["--data", options.data], ["--micro_batch", 2, "--sequence_length", 64]
    as_one_of_four = ["--preset", "124M", "--accumulation", 4, *data]
    start = ["batch.tokens_per_step=131072", "batch.micro_batch=32", "hellaswag.every=0", f"data.dir={options.data}"]
    short_step = ["batch.tokens_per_step=128", "batch.micro_batch=2", "batch.sequence_length=64", "validation.every=0"]
    return [
        Program(
            "training_run.py",
            [*data, "--steps", 250],
            [Goal("S1", "124M, train.py", 550_000, "tokens/s", lambda it: it["tokens_per_s"]["median"])],
            toy=[*data, "--preset", "7M", *small, "--tokens", 128, "--warm_up", 1, "--steps", 4],
        ),
        Program(
            "throughput_gpu.py",
            [*data, "--rounds", 4, "--steps", 6, "--curve", 6, "--arms", "bare", "plain"],
            [
                Goal("S2", "engine, of a plain loop", 1.15, "x", lambda it: it["engine_against"]["plain"]["median"]),
                Goal("S2", "engine, without DeepSpeed", 0.98, "x", lambda it: it["engine_against"]["bare"]["median"]),
            ],
            ranks=1,
            toy=[*data, "--preset", "toy", *small, "--accumulation", 2, "--rounds", 2, "--steps", 1, "--curve", 2],
        ),
        Program(
            "checkpoint_stall.py",
            [*as_one_of_four, "--rounds", 3, "--steps", 20],
            [
                Goal("S4", "held by a save", 5, "ms", lambda it: it["held_ms"]["background"]["p50"], at_most=True),
                Goal("S4", "a save every 250 steps", 0.5, "%", lambda it: _saving(it), at_most=True),
                BYTES,
            ],
            ranks=1,
            toy=[*data, "--preset", "toy", "--rounds", 2, "--steps", 1],
        ),
        Program(
            "monitor_overhead.py",
            [*as_one_of_four, "--one_of", 4, "--rounds", 3, "--steps", 10, "--hellaswag", options.hellaswag],
            MONITORING,
            ranks=1,
            toy=[*data, "--preset", "toy", "--rounds", 1, "--steps", 1, "--occasions", 1],
        ),
        Program(
            "hellaswag.py",
            ["--file", options.hellaswag, "--preset", "124M", "--device", "cuda", "--items", 1000, "--rounds", 4],
            [Goal("S6", "HellaSwag, of a plain loop", 10, "x", lambda it: _hellaswag(it))],
            toy=["--file", options.hellaswag, "--preset", "7M", "--items", 4, "--rounds", 2],
        ),
        Program(
            "startup.py",
            ["--config", "gpt2_124m", "--num_gpus", 1, "--starts", 2, "--cold", *start],
            [Goal("S8", "restart, warm caches", 30, "s", lambda it: it["resumed_s"]["first step"], at_most=True)],
            toy=["--num_gpus", 1, "--starts", 1, f"data.dir={options.data}", *short_step],
        ),
        Program(
            "memory.py",
            [*data, "--cases", "124M:16", "350M:16"],
            toy=[*data, "--cases", "7M:2", "--sequence_length", 64],
        ),
    ]


def cpu_suite(options: argparse.Namespace) -> list[Program]:
    data = ["--data", options.data]
    return [
        Program(
            "throughput.py",
            data,
            [Goal("S3", "7 M on four ranks, compiled, of a plain loop", 2.5, "x", lambda it: _throughput(it))],
            limit=1500,
        ),
        Program(
            "checkpoint_stall.py",
            [*data, "--rounds", 10],
            [
                Goal("S4", "held by a save, of a plain one", 5, "%", lambda it: 100 * it["held_ratio"], at_most=True),
                BYTES,
            ],
            ranks=4,
        ),
        Program("monitor_overhead.py", [*data, "--rounds", 8, "--steps", 15, "--occasions", 3], MONITORING, ranks=4),
        Program(
            "hellaswag.py",
            ["--file", options.hellaswag, "--items", 200, "--rounds", 4],
            [Goal("S6", "HellaSwag, of a plain loop", 10, "x", lambda it: _hellaswag(it))],
        ),
        Program(
            "tokenizing.py",
            ["--text", *options.text],
            [Goal("S7", "text to shards, of the recipe", 1.5, "x", lambda it: _tokenizing(it))],
        ),
        Program(
            "startup.py",
            [f"data.dir={options.data}"],
            [Goal("S8", "restart, four ranks", 15, "s", lambda it: it["resumed_s"]["first step"], at_most=True)],
        ),
        Program("loader.py", []),
        Program("memory.py", [*data, "--cases", "7M:2", "30M:2", "--sequence_length", 256]),
    ]


def _saving(it: Found) -> float:
    """Return the cost of a save as a percentage of the time of 250 steps.

    It is the sum of the blocking time, the slowdown of the following steps, and the remaining time of writing.
    """
    step = it["block_ms"]["none"]["p50"] / it["steps_a_block"]
    slowed = max(0.0, it["excess_ms_of_a_background_save"])
    return 100 * (it["held_ms"]["background"]["p50"] + slowed + it["still_writing_ms"]) / (250 * step)


def _monitoring_share(it: Found) -> float:
    """Return the share of monitoring in percent at the intervals of gpt2_124m.yaml, without validation."""
    shares = [each["share_of_the_time"] for name, each in it["occasions"].items() if not name.startswith("validation")]
    return 100 * (it["scalars_share_of_the_time"] + sum(shares))


def _hellaswag(it: Found) -> float:
    (found,) = (each for each in it.values() if isinstance(each, dict) and "wall" in each)
    return found["wall"]["ds_gpt2 against autocast"]["median"]


def _throughput(it: Found) -> float:
    return it["against plain DDP"]["ds_gpt2, compiled"]["median"]


def _tokenizing(it: Found) -> float:
    return max(each["ratio_median"] for name, each in it["speed"].items() if name.startswith("workers_"))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--suite", choices=["cpu", "gpu"], required=True)
    parser.add_argument("--data", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--hellaswag", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", type=Path, nargs="*", default=[], metavar="FILE", help="English text to tokenize")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", help="run only these programs")
    parser.add_argument("--toy", action="store_true", help="check that the GPU programs run, with tiny models")
    options = parser.parse_args()
    if options.suite == "cpu" and options.toy:
        parser.error("--toy is for the GPU suite")
    if options.suite == "cpu" and not options.text:
        parser.error("the CPU suite needs --text")
    options.out.mkdir(parents=True, exist_ok=True)
    programs = gpu_suite(options) if options.suite == "gpu" else cpu_suite(options)
    if options.toy:
        programs = [replace(program, words=program.toy) for program in programs]
    chosen = [program for program in programs if options.only is None or program.name in options.only]
    can_run = options.toy or options.suite == "cpu" or machine.describe()["gpu"] != "none"
    found: dict[str, Found | None] = {}
    rows = _write_table(programs, found, options)
    for program in chosen if can_run else []:
        found[program.name] = run(program, options)
        rows = _write_table(programs, found, options)
    print(_as_text(rows))
    if failed := [name for name, result in found.items() if result is None]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _write_table(
    programs: Sequence[Program], found: dict[str, Found | None], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Write the table and return its rows. It is written after each program, so an interrupted suite has one."""
    rows = [row for program in programs for row in _rows(program, found.get(program.name), options.toy)]
    table = {"machine": machine.describe(), "suite": options.suite, "goals": rows}
    (options.out / f"goals_{options.suite}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return rows


def run(program: Program, options: argparse.Namespace) -> Found | None:
    """Run a program and return its results; print and return None if it failed."""
    out = options.out / f"{program.name}_{options.suite}.json"
    out.unlink(missing_ok=True)
    file, words = Path(__file__).with_name(program.file), [*map(str, program.words), "--out", str(out)]
    layout = RankLayout("cpu" if options.suite == "cpu" else "cuda", program.ranks)
    command = start_command(layout, file, words) if program.ranks else [sys.executable, str(file), *words]
    environment = dict(os.environ)
    if options.suite == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu"} | ({"OMP_NUM_THREADS": "1"} if program.ranks else {})
    print(f"{program.name} ...", end=" ", flush=True)
    start_time = time.monotonic()
    with (options.out / f"{program.name}_{options.suite}.log").open("w", encoding="utf-8") as log:
        done = _succeeds(command, environment, log, program.limit)
    print(f"{'' if done else 'failed after '}{time.monotonic() - start_time:.0f} s", flush=True)
    return json.loads(out.read_text(encoding="utf-8")) if done else None


def _succeeds(command: Sequence[str], environment: dict[str, str], log: TextIO, limit: float) -> bool:
    """Return whether ``command`` succeeds within ``limit`` seconds; otherwise kill all of its processes."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        started = psutil.Process(process.pid)
        for each in [*started.children(recursive=True), started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        return False


def _rows(program: Program, found: Found | None, toy: bool) -> list[dict[str, Any]]:
    rows = []
    for goal in program.goals:
        value = None if found is None else goal.read(found)
        value = None if toy else value  # only checked to be readable
        target = f"{'<=' if goal.at_most else '>='} {goal.target:,.6g} {goal.unit}"
        measured = "not measured" if value is None else f"{value:,.6g} {goal.unit}"
        ratio = None if value is None else round(goal.ratio(value), 3)
        rows.append({"goal": goal.name, "what": goal.what, "wanted": target, "measured": measured, "ratio": ratio})
    return rows


def _as_text(rows: Sequence[dict[str, Any]]) -> str:
    names = ("goal", "what", "wanted", "measured", "ratio")
    lines = [names, *(tuple("" if row[name] is None else str(row[name]) for name in names) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    main()
