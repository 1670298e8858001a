"""Kill runs at random times and compare the results with an undisturbed run.

    python benchmarks/kill_soak.py --kills 300 --out benchmarks/results/kill_soak.json

A small GPT-2 with dropout trains on two ranks over several epochs. It saves often and slowly, and evaluates often, so
that many kills occur during a save or an evaluation. SIGKILL is sent to one rank, to all ranks, or to DeepSpeed's
launcher; sometimes SIGTERM requests a stop instead. After each signal, every committed checkpoint must verify; at most
the steps since the last started save (or the one before it, if it was still being written) may be lost; and the next
start must resume from the newest checkpoint. At the end of a run, its weights, moments, random states, metrics and
ledger of windows must be bitwise equal to those of the undisturbed run, and TensorBoard must show every step once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.program import make_parser, report_result
from benchmarks.runs import prepare_manual, write_config
from ds_gpt2.checkpoint.catalog import Generation, problem_of, scan
from ds_gpt2.checkpoint.naming import PARTIAL, rolling_tag
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

PROJECT = Path(__file__).resolve().parents[1]
STEPS, EVERY, SEQUENCE = 120, 5, 32
STOP = "a stop"
VICTIMS = ("one rank", "all ranks", "the launcher", STOP)


@dataclass
class Tally:
    """Counts of the whole test."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)  # see _kill
    lost_steps: list[int] = field(default_factory=list)
    verified: int = 0
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def sigkills(self) -> int:
        return sum(count for victim, count in self.kills.items() if victim != STOP)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILURE: {what}", flush=True)


class Ranks:
    """A started run: its processes, and its progress by its output."""

    def __init__(self, config: Path, ranks: int) -> None:
        self.process = subprocess.Popen(
            start_command(RankLayout("cpu", ranks), TRAIN, ["--config", str(config), "--resume", "auto"]),
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.shown = 0  # steps in its output
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self.shown += bool(re.match(r"step +\d+/", line))

    @property
    def step(self) -> int:
        """The last printed step."""
        return max(
            (int(found[1]) for line in list(self.lines) if (found := re.match(r"step +(\d+)/", line))), default=0
        )

    @property
    def resumed_from(self) -> str | None:
        found = re.search(r"resumed from \S*/(\S+), step", "".join(self.lines))
        return found[1] if found else None

    def wait_for_steps(self, count: int) -> None:
        """Wait until ``count`` steps are printed or the run ends."""
        deadline = time.monotonic() + 300
        while self.shown < count and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def members(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self, patience: float) -> None:
        """Wait for the end; kill the remaining processes after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._reader.join()


def soak(kills: int, ranks: int, seed: int, folder: Path) -> Tally:
    """Send SIGKILL ``kills`` times, over as many runs as necessary, and additional stop requests."""
    rng, tally, start_time = random.Random(seed), Tally(), time.monotonic()
    data = prepare_manual(folder / "data", 6, 9, held_out=8)
    references = {accumulation: _reference(folder, data, ranks, accumulation) for accumulation in (1, 4)}
    for accumulation in itertools.cycle(references):
        if tally.sigkills >= kills:
            return tally
        config = _write_config(folder, data, ranks, accumulation)
        for name in ("runs", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
        _one_run(config, ranks, kills, rng, tally)
        for difference in _differences(references[accumulation], folder):
            tally.fail(f"run {tally.runs}, accumulation {accumulation}: {difference}")
        tally.runs += 1
        done, minutes = tally.sigkills, (time.monotonic() - start_time) / 60
        left = minutes * max(0, kills - done) / max(1, done)
        print(f"{tally.runs} runs, {done}/{kills} kills, {minutes:.0f} min, eta {left:.0f} min", flush=True)
    raise AssertionError("the accumulations never end")


def _one_run(config: Path, ranks: int, kills: int, rng: random.Random, tally: Tally) -> None:
    """Train from scratch to the last step, with kills while any remain."""
    directory = config.parent / "checkpoints" / "soak"
    while True:
        expected = _newest(directory)
        run = Ranks(config, ranks)
        if not (tally.sigkills < kills and _kill(run, rng, tally, directory)):
            run.end(patience=600)
            if run.process.returncode != 0:
                tally.fail("an undisturbed start failed: " + "".join(run.lines)[-2000:])
                return
        tag = run.resumed_from
        if expected is not None and tag not in (None, expected.tag) and _step_in(tag) <= expected.step:
            tally.fail(f"resumed from {tag}, the newest was {expected.tag}")  # a newer one is an interrupted commit
        _inspect(directory, run.step, tally)
        newest = _newest(directory)
        if newest is not None and newest.step == STEPS and newest.manifest is not None and newest.manifest.is_evaluated:
            return


def _kill(run: Ranks, rng: random.Random, tally: Tally, directory: Path) -> bool:
    """Send a signal at a random time: 1 in 8 during the start, else within ten steps. Return False if it had ended."""
    if rng.random() < 1 / 8:
        time.sleep(rng.uniform(0.5, 8))
    else:
        run.wait_for_steps(rng.randint(1, 10))
        time.sleep(rng.uniform(0, 0.15))
    victim = rng.choice(VICTIMS)
    members = run.members()
    if not members:
        return False
    ranks = [member for member in members if _is_rank(member)]
    tally.kills[victim] += 1
    saving = any(directory.glob(f"*{PARTIAL}")) if directory.is_dir() else False
    beat = read_beat(directory.parents[1] / "runs" / "soak", 0)
    is_present = beat is not None and beat.pid in [rank.pid for rank in ranks]
    evaluating = is_present and beat is not None and beat.phase == "evaluating"
    moments = {"in a save": saving, "in an evaluation": evaluating, "in a step": run.shown > 0, "while starting": True}
    tally.moments[next(moment for moment, found in moments.items() if found)] += 1
    number = signal.SIGTERM if victim == STOP else signal.SIGKILL
    targets = {
        "one rank": [rng.choice(ranks)] if ranks else members,
        "all ranks": ranks or members,
        "the launcher": [member for member in members if member not in ranks],
        STOP: ranks or members,
    }[victim]
    for target in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(number)
    run.end(patience=60 if victim == STOP else rng.choice([0, 0, 3]))
    return True


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return any(word.endswith("ds_gpt2/train.py") for word in words) and not any(
            "launcher" in word for word in words
        )
    return False


def _inspect(directory: Path, reached: int, tally: Tally) -> None:
    """Check that every checkpoint is complete and the newest one is recent enough."""
    generations = scan(directory)
    for generation in generations:
        tally.verified += 1
        if (problem := problem_of(generation)) is not None:
            tally.fail(f"{generation.tag}: {problem}")
    newest = max((generation.step for generation in generations), default=0)
    if reached:
        tally.lost_steps.append(max(0, reached - newest))
        last_started = (reached - 1) // EVERY * EVERY  # a step is printed before its save starts
        if newest < last_started - EVERY:
            tally.fail(f"step {reached} was reached, but the newest checkpoint is of step {newest}")


def _newest(directory: Path) -> Generation | None:
    history = [found for found in scan(directory) if found.role in ("rolling", "epoch") and problem_of(found) is None]
    return history[0] if history else None


def _step_in(tag: str) -> int:
    return int(tag.rsplit("_", 1)[1])


def _reference(folder: Path, data: Path, ranks: int, accumulation: int) -> Path:
    """Train an undisturbed run, at the same paths as the others, and return the directory it is moved to."""
    run = Ranks(_write_config(folder, data, ranks, accumulation), ranks)
    run.end(patience=600)
    reference = folder / f"reference-{accumulation}"
    reference.mkdir()
    for name in ("runs", "checkpoints"):
        (folder / name).rename(reference / name)
    return reference


def _write_config(folder: Path, data: Path, ranks: int, accumulation: int) -> Path:
    return write_config(
        folder,
        data,
        "soak",
        model={"dropout": 0.1},
        batch={"tokens_per_step": SEQUENCE * ranks * accumulation, "micro_batch": 1, "sequence_length": SEQUENCE},
        schedule={"steps": STEPS, "warmup_steps": 10, "max_lr": 3e-3, "min_lr": 3e-4},
        checkpoint={"every": EVERY, "keep_last": 3, "keep_epochs": 2, "write_mb_per_s": 60},
        validation={"every": 7, "tokens": 40 * SEQUENCE},
        samples={"every": 3, "prompts": ["The statement"], "tokens": 60},
        histograms={"every": 20},
    )


def _differences(reference: Path, folder: Path) -> list[str]:
    """Return the differences of a run from the reference: the whole state, the metrics of every step, the curves."""
    directories = [parent / "checkpoints" / "soak" for parent in (reference, folder)]
    tags = [{found.tag for found in scan(directory) if found.role in ("best", "epoch")} for directory in directories]
    differences = [f"{tag} exists in one run only" for tag in tags[0] ^ tags[1]]
    for tag in (rolling_tag(STEPS), *sorted(tags[0] & tags[1])):
        found = checkpoint_differences(*(directory / tag for directory in directories))
        differences += [f"{tag}: {difference}" for difference in found]
    runs = [parent / "runs" / "soak" for parent in (reference, folder)]
    return differences + curve_differences(*runs) + curve_problems(runs[1])


def curve_problems(run_dir: Path) -> list[str]:
    """Return the curves in which TensorBoard's reader does not find exactly the records of metrics.jsonl."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    recorded: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(run_dir / METRICS):
        for tag, value in record.items():
            if tag not in ("step", "time") and not isinstance(value, str):
                recorded.setdefault(tag, []).append((record["step"], np.float32(math.inf if value is None else value)))
    return [
        f"TensorBoard's curve {tag} differs from metrics.jsonl"
        for tag in sorted(shown.keys() | recorded.keys())
        if shown.get(tag, []) != recorded.get(tag, [])
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as folder:
        tally = soak(options.kills, options.ranks, options.seed, Path(folder))
    result = {
        "sigkills": tally.sigkills,
        "kills": dict(tally.kills),
        "moments": dict(tally.moments),
        "runs_compared_bit_for_bit": tally.runs,
        "checkpoints_verified": tally.verified,
        "lost_steps": dict(sorted(Counter(tally.lost_steps).items())),
        "save_every": EVERY,
        "minutes": round((time.monotonic() - start_time) / 60, 1),
        "failures": tally.failures,
    }
    report_result(options.out, result)
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
