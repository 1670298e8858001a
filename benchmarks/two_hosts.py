"""Measure steps on two hosts whose link is limited, and compare them with the prediction of docs/scaling.md.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python benchmarks/two_hosts.py --data data/sample --out FILE

The hosts are network namespaces of this machine, which needs root; each has two ranks. Three runs train, one after the
other: gradients reduced in fp32, in bf16, and in fp32 with four times the tokens per step. Within each run the limits
of the link take turns. The prediction uses only the steps without a limit of the fp32 runs.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.host_pair import Host, TwoHosts, problem
from benchmarks.program import make_parser, report_result
from benchmarks.runs import steps_only
from benchmarks.scaling import GRADIENT, step_seconds, zero_2
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

RANKS = 4
LIMITS = {"no limit": None, "10 Gbit/s": 10e9, "1 Gbit/s": 1e9}  # bits per second
_SEQUENCE, _MICRO_BATCH = 128, 2
_SETTLE_STEPS = 2  # that are not counted after the limit has changed
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Arm:
    """One run."""

    accumulation: int
    gradient_bytes: int  # per parameter, as gradients are sent


ARMS = {"fp32": Arm(1, GRADIENT), "bf16": Arm(1, 2), "fp32, 4 x tokens": Arm(4, GRADIENT)}


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps per round and limit")
    options = parser.parse_args()
    if (reason := problem()) is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, _hosts(Path(folder) / "hosts") as hosts:
        runs = {
            name: _measure(hosts, Path(folder) / f"run_{arm}", ARMS[name], options) for arm, name in enumerate(ARMS)
        }
    report_result(options.out, _result(options.preset, runs))


@contextmanager
def _hosts(folder: Path) -> Iterator[TwoHosts]:
    hosts = TwoHosts(folder)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def _measure(hosts: TwoHosts, folder: Path, arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each step per limit, and the bytes that a host sends in a step."""
    folder.mkdir()
    hosts.limit(None)
    with (folder / "output").open("wb") as output:
        run = subprocess.Popen(hosts.a.command(_command(hosts, folder, arm, options)), stdout=output, stderr=output)
    try:
        metrics = _Metrics(run, folder)
        metrics.seconds_of(time.time(), _SETTLE_STEPS)
        found: dict[str, list[float]] = {name: [] for name in LIMITS}
        start_time, start_bytes = time.time(), _sent_bytes(hosts.a)
        for _ in range(options.rounds):
            for name, limit in LIMITS.items():
                hosts.limit(limit)
                found[name] += metrics.seconds_of(time.time(), _SETTLE_STEPS + options.steps)[_SETTLE_STEPS:]
                print(f"{name}: {statistics.median(found[name]):.3f} s per step", file=sys.stderr, flush=True)
        end_time, end_bytes = time.time(), _sent_bytes(hosts.a)
        metrics.seconds_of(end_time, 1)  # until all earlier steps are recorded
        sent = (end_bytes - start_bytes) / metrics.count(start_time, end_time)
    finally:
        for process in psutil.Process(run.pid).children():  # nsenter passes no signals on
            process.terminate()
        run.wait()
    return {"seconds": found, "sent_bytes": sent}


def _command(hosts: TwoHosts, folder: Path, arm: Arm, options: argparse.Namespace) -> list[str]:
    hostfile, deepspeed = folder / "hosts", folder / "deepspeed.json"
    hostfile.write_text("".join(f"{host.name} slots={RANKS // 2}\n" for host in hosts.all))
    content = json.loads((PROJECT_DIR / "ds_configs" / "zero2_bf16.json").read_text(encoding="utf-8"))
    if arm.gradient_bytes != GRADIENT:
        content["communication_data_type"] = "bf16"
    deepspeed.write_text(json.dumps(content))
    tokens = RANKS * _MICRO_BATCH * _SEQUENCE * arm.accumulation
    settings = steps_only(folder, options.data, options.preset, **{
        "batch.sequence_length": _SEQUENCE, "batch.micro_batch": _MICRO_BATCH, "batch.tokens_per_step": tokens,
        "schedule.steps": 100_000, "deepspeed": deepspeed, "cluster.hostfile": hostfile,
    })  # fmt: skip
    command = [sys.executable, str(PROJECT_DIR / "ds_gpt2" / "__main__.py"), "train", "quickstart"]
    return [*command, *(f"{name}={value}" for name, value in settings.items())]


class _Metrics:
    """The step times of a run that trains."""

    def __init__(self, run: subprocess.Popen[bytes], folder: Path) -> None:
        self._run = run
        self._folder = folder

    def seconds_of(self, begin: float, steps: int) -> list[float]:
        """Wait for the records of ``steps`` steps that begin after ``begin``; return the seconds of each.

        Args:
            begin: seconds since 1970. Steps are recorded some seconds later.
        """
        while len(found := [end - start for start, end in self._steps() if start > begin]) < steps:
            if self._run.poll() is not None:
                raise SystemExit((self._folder / "output").read_text(errors="replace")[-4000:])
            time.sleep(_POLL_SECONDS)
        return found[:steps]

    def count(self, begin: float, end: float) -> int:
        """Return the number of steps that ended after ``begin`` and by ``end``."""
        return sum(begin < step_end <= end for _, step_end in self._steps())

    def _steps(self) -> list[tuple[float, float]]:
        """Return when each recorded step began and ended."""
        records = read_metrics(self._folder / "runs" / "run" / METRICS)
        return [(record["time"] - record["perf/step_ms"] / 1000, record["time"]) for record in records]


def _sent_bytes(host: Host) -> int:
    """Return the bytes that a host has sent to the other one."""
    devices = Path(f"/proc/{host.init.pid}/net/dev").read_text(encoding="ascii")
    return int(devices.split("eth0:")[1].split()[8])


def _result(preset: str, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from ds_gpt2.config.settings import ModelSettings
    from ds_gpt2.tools.resources.memory_model import describe_model

    parameters = describe_model(ModelSettings(preset=preset), _SEQUENCE, compiled=True).parameters
    medians = {name: _medians(run["seconds"]) for name, run in runs.items()}
    once, four_times = (medians[name]["no limit"] for name in ("fp32", "fp32, 4 x tokens"))
    micro_batch = (four_times - once) / 3
    rest = once - micro_batch
    table = {}
    for name, arm in ARMS.items():
        sent = zero_2(parameters, RANKS, arm.gradient_bytes)
        rows = {}
        for limit, rate in LIMITS.items():
            predicted = step_seconds(micro_batch * arm.accumulation + rest, sent, rate and rate / 8)
            measured = medians[name][limit]
            rows[limit] = {
                "measured_s": round(measured, 4),
                "predicted_s": round(predicted, 4),
                "off": round(predicted / measured - 1, 3),
            }
        table[name] = {
            "predicted_bytes": round(sent),
            "sent_bytes": round(runs[name]["sent_bytes"]),
            "steps": rows,
        }
    return {
        "setting": f"{preset}, {RANKS // 2} gloo ranks per host, micro-batches of {_MICRO_BATCH} x {_SEQUENCE} tokens",
        "micro_batch_s": round(micro_batch, 4),
        "rest_of_a_step_s": round(rest, 4),
        "runs": table,
        "seconds": {name: run["seconds"] for name, run in runs.items()},
    }


def _medians(seconds: dict[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
