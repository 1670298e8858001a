"""Mutate every file that the project reads, and run the commands that read it.

    python benchmarks/fuzz.py --minutes 10 --out benchmarks/results/fuzz_cpu.json

A small run is trained on one rank and its model exported. Then hypothesis mutates one file at a time: values are
replaced, removed, renamed or nested; bytes are changed, inserted or cut. The checksum inside a forged manifest is
recomputed. A command must end within seconds and limited memory, with a result or with one line and exit code 2. An
exception, several lines, or a changed file is a failure.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.mutations import mutations
from benchmarks.program import make_parser, report_result
from benchmarks.runs import prepare_manual, write_config
from ds_gpt2 import cli
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.output_owner import OWNER
from ds_gpt2.config.settings import load_settings
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.pretrained import load
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.supervisor_record import RECORD

PROJECT = Path(__file__).resolve().parents[1]
TAG = "rolling_step_000004"
SECONDS = 20  # time limit of a command
MEMORY = 4 << 30  # bytes that a command may allocate
BATCH = 20  # consecutive mutations of one file
LONGEST_LINE = 2000  # characters


@dataclass(frozen=True)
class Target:
    """A file, and the actions that read it."""

    file: Path
    form: str  # "json", "jsonl", "yaml", "manifest" or "bytes"
    actions: Sequence[Callable[[], object]]


@dataclass
class Tally:
    runs: int = 0
    values: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    failures: Counter[str] = field(default_factory=Counter)


class FailureError(Exception):
    """A failure, described by the message."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name) / "world"
        folder.mkdir()
        targets = make_world(folder, cache=Path(name))
        smallest: dict[str, bytes] = {}
        tallies = fuzz(targets, folder, 60 * options.minutes, options.seed, smallest)
    for failure, data in smallest.items():
        print(f"{failure}\n    {base64.b64encode(data[:3000]).decode()}")
    total = sum(tally.runs for tally in tallies.values())
    results: dict[str, Any] = {
        "minutes": options.minutes,
        "seed": options.seed,
        "commands_run": total,
        "refused": sum(tally.refused for tally in tallies.values()),
        "failures": sum(sum(tally.failures.values()) for tally in tallies.values()),
        "by_file": {
            name: {
                "run": tally.runs,
                "refused": tally.refused,
                "slowest_s": round(tally.slowest, 2),
                "failures": dict(tally.failures),
            }
            for name, tally in tallies.items()
        },
    }
    report_result(options.out, results)
    sys.exit(results["failures"] > 0)


def make_world(folder: Path, cache: Path) -> dict[str, Target]:
    """Create a dataset, a run of four steps with its checkpoints, and exported models; return the files to mutate.

    Args:
        cache: a directory that commands may write to.
    """
    data = prepare_manual(folder / "data", 6, 8, held_out=8)
    config = write_config(
        folder,
        data,
        "fuzz",
        batch={"tokens_per_step": 128, "micro_batch": 1, "sequence_length": 64},
        schedule={"steps": 4, "warmup_steps": 1},
        checkpoint={"every": 2},
        validation={"every": 2, "tokens": 128},
        samples={"every": 0},
    )
    command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "train", str(config), "--num_gpus", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run, checkpoint = folder / "runs" / "fuzz", folder / "checkpoints" / "fuzz" / TAG
    exported, plain = folder / "exported", folder / "fp32.pt"
    for to, form in ((exported, "hf"), (plain, "fp32")):
        _command("export", str(run), "--format", form, "--out", str(to))()
    _command("notes", str(run), "a note")()
    items = folder / "items.jsonl"
    item = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "ctx": "b", "endings": ["c", "d", "e", "f"], "label": 1}
    items.write_text((json.dumps(item) + "\n") * 3, encoding="utf-8")
    ds_file = folder / "ds.json"
    ds_file.write_bytes((PROJECT / "ds_configs" / "zero2_bf16.json").read_bytes())

    status = _command("status", str(run), "--json")
    report, listed = _command("report", str(run), "--json"), _command("list", str(run), "--json")
    verify, inspect = _command("verify", str(run), "--all"), _command("inspect", str(data), "--seed", "1")
    doctor = _command("doctor", str(config), "--quick", "--num_gpus", "1")
    shard = next(data.glob("train_*"))
    return {
        "settings": Target(config, "yaml", [lambda: load_settings(config), doctor]),
        "DeepSpeed's file": Target(ds_file, "json", [lambda: load_deepspeed_file(ds_file)]),
        "run: config.yaml": Target(run / "config.yaml", "yaml", [status, listed, verify]),
        "metrics.jsonl": Target(run / "metrics.jsonl", "jsonl", [status, report]),
        "journal.jsonl": Target(run / "journal.jsonl", "jsonl", [status, report]),
        "starts.jsonl": Target(run / "starts.jsonl", "jsonl", [status, report]),
        "supervisor.json": Target(run / RECORD, "json", [status]),
        "heartbeat": Target(run / "heartbeat" / "rank_00000", "bytes", [status]),
        "NOTES.md": Target(run / "NOTES.md", "bytes", [_command("notes", str(run), "--json")]),
        "manifest": Target(checkpoint / MANIFEST, "bytes", [listed, verify, status]),
        "forged manifest": Target(
            checkpoint / MANIFEST,
            "manifest",
            [listed, verify, status, _command("verify", str(run), TAG, "--deep"), _generate(run)],
        ),
        "pointer": Target(checkpoint.parent / "latest", "bytes", [listed, status]),
        "dataset.json": Target(data / "dataset.json", "json", [inspect, _command("verify", str(data))]),
        "shard": Target(shard, "bytes", [inspect, _command("verify", str(data))]),
        "HellaSwag": Target(items, "jsonl", [lambda: load_items(items, "original", cache / "items")]),
        "run.json": Target(checkpoint.parent / OWNER, "json", [listed, doctor]),
        "config.json": Target(exported / "config.json", "json", [lambda: load.read(exported)]),
        "safetensors": Target(exported / "model.safetensors", "bytes", [lambda: load.read(exported)]),
        "fp32.pt": Target(plain, "bytes", [lambda: load.read(plain)]),
    }


def _command(*words: str) -> Callable[[], object]:
    """Return an action that runs a command of ``launch.sh`` in this process.

    It raises UserError if the command exits with code 2.
    """

    def run() -> None:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = cli.main(list(words))
        shown = [*output.getvalue().splitlines(), *errors.getvalue().splitlines()]
        if any("Traceback" in line for line in shown):
            raise FailureError("it prints a traceback")
        # Generated text may have any characters; they are escaped for a terminal only.
        ours = errors.getvalue().splitlines() if words[0] == "generate" else shown
        if any(ord(each) < 32 and each != "\t" for line in ours for each in line):
            raise FailureError("it prints control characters")
        if code == exit_codes.MISTAKE:
            raise UserError(errors.getvalue().strip("\n"))

    return run


def _generate(run: Path) -> Callable[[], object]:
    return _command("generate", str(run), "--tag", TAG, "--tokens", "1", "--device", "cpu")


def fuzz(
    targets: dict[str, Target], folder: Path, seconds: float, first_seed: int, smallest: dict[str, bytes]
) -> dict[str, Tally]:
    """Mutate the targets in turn until ``seconds`` have passed.

    Args:
        smallest: receives the shortest content of a file for each failure.
    """
    tallies = {name: Tally() for name in targets}
    deadline = time.monotonic() + seconds
    for number in itertools.count(first_seed):
        for name, target in targets.items():
            if time.monotonic() > deadline:
                return tallies
            mutate(name, target, folder, number, BATCH, tallies[name], smallest)
        done = sum(tally.runs for tally in tallies.values())
        failed = sum(sum(tally.failures.values()) for tally in tallies.values())
        print(f"{done:,} commands, {failed} failures, {deadline - time.monotonic():.0f} s left", flush=True)
    raise AssertionError("the seeds never end")


def mutate(
    name: str, target: Target, folder: Path, number: int, count: int, tally: Tally, smallest: dict[str, bytes]
) -> None:
    """Mutate a file ``count`` times, always from its original content, and restore it.

    Args:
        number: seed.
    """
    original = target.file.read_bytes()

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=mutations(target.form, original))
    def attempt(data: bytes) -> None:
        target.file.write_bytes(data)
        before = _listing(folder)
        for action in target.actions:
            failure = _play(action, tally)
            if failure is None and _listing(folder) != before:
                failure = "it changes files"
                before = _listing(folder)
            if failure is not None:
                tally.failures[failure] += 1
                key = f"{name}: {failure}"
                if len(data) < len(smallest.get(key, data + b" ")):
                    smallest[key] = data

    try:
        attempt()
    finally:
        target.file.write_bytes(original)


def _play(action: Callable[[], object], tally: Tally) -> str | None:
    """Run ``action``; return a description of a failure, or None."""
    tally.runs += 1
    start_time = time.monotonic()
    try:
        with _limits():
            action()
        tally.values += 1
    except (UserError, DamagedError) as error:
        tally.refused += 1
        text = str(error)
        if "\n" in text or len(text) > LONGEST_LINE:
            return f"a refusal of {len(text.splitlines())} lines, {len(text) // 1000},000 characters"
    except _OverdueError:
        return f"it does not end within {SECONDS} s"
    except FailureError as failure:
        return str(failure)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/ds_gpt2/" in frame.filename]
        where = ours[-1] if ours else last
        return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
    finally:
        tally.slowest = max(tally.slowest, time.monotonic() - start_time)
    return None


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    usual = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, usual[1]))
    before = signal.signal(signal.SIGALRM, _time_is_over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, usual)


class _OverdueError(BaseException):
    """Not a subclass of Exception, which a command could catch."""


def _time_is_over(number: int, frame: FrameType | None) -> None:
    raise _OverdueError


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and modification time of every file."""
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (status.st_size, status.st_mtime_ns)
    return found


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
