"""What a trial tells: read from the files that any run leaves, and from the ranks' records of their memory."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.common.files import read_small
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.plan.trial_rank import RankMemory, read_record
from ds_gpt2.tools.resources.checkpoint_space import Logs

_WARM_UP = 2  # steps that do not count: buffers, caches, the optimizer's first update

Record = dict[str, Any]
Piece = tuple[int, int]  # the step that something was written for, 0 for none; bytes


@dataclass(frozen=True)
class SaveCost:
    """One checkpoint beside training."""

    held_seconds: float  # the training thread stood still
    slower_seconds: float  # the steps beside it took so much longer
    write_seconds: float  # until it was committed


@dataclass(frozen=True)
class Traces:
    """What was measured."""

    steps: int
    accumulation: int  # micro-batches of a step that were run
    start_seconds: float  # from the start of the ranks to the end of the first step
    step_seconds: list[float]  # of steps with all their micro-batches, nothing beside them
    costs: dict[str, float]  # seconds by name of the hook
    save: SaveCost | None
    ranks: list[RankMemory]
    checkpoint_bytes: int | None
    weights_bytes: int | None  # of one kept as weights alone
    logs: Logs
    tensorboard: Logs  # that part of ``logs``
    watts: float | None  # of the GPUs
    mfu: float | None  # of the steps as they were run


def read_traces(
    settings: Settings,
    folder: Path,
    ranks: int,
    accumulation: int,
    tried: int,
    due: Mapping[str, int],
    begun: float,
) -> Traces:
    """
    Args:
        settings: of the trial.
        folder: where the ranks left their records.
        accumulation, tried: micro-batches a step of the run, and of its trial.
        due: the step of each hook.
        begun: when the ranks were started, seconds since 1970.
    """
    records = list(read_metrics(settings.run_dir / METRICS))
    seconds = {record["step"]: _step_seconds(record, accumulation / tried) for record in records}
    saved = next((event for event in read_journal(settings.run_dir) if event.kind == "save"), None)
    beside = _steps_beside(saved, records)
    alone = [took for step, took in seconds.items() if step > _WARM_UP and step not in beside] or list(seconds.values())
    logs, shown = _logs(settings, records, due)
    full, weights = _checkpoint_sizes(settings.checkpoint_dir)
    return Traces(
        steps=len(records),
        accumulation=tried,
        start_seconds=records[0]["time"] - begun,
        step_seconds=alone,
        costs=_costs(records, due),
        save=_save(saved, records, [seconds[step] for step in beside], statistics.fmean(alone)),
        ranks=[read_record(folder, rank) for rank in range(ranks)],
        checkpoint_bytes=full,
        weights_bytes=weights,
        logs=logs,
        tensorboard=shown,
        watts=_mean([record["perf/gpu_power_w"] for record in records if record.get("perf/gpu_power_w")]),
        mfu=_mean([record["perf/mfu"] for record in records[_WARM_UP:] if record.get("perf/mfu")]),
    )


def _step_seconds(record: Record, more: float) -> float:
    """What the step would have taken with ``more`` times as many micro-batches."""
    forward_backward = record.get("perf/forward_backward_ms") or 0.0
    return float(record["perf/step_ms"] + (more - 1) * forward_backward) / 1000


def _costs(records: Sequence[Record], due: Mapping[str, int]) -> dict[str, float]:
    """A step's record tells what was evaluated after the step before."""
    by_step = {record["step"]: record for record in records}
    return {
        name: float(by_step[step + 1].get("perf/eval_ms") or 0.0) / 1000
        for name, step in due.items()
        if step + 1 in by_step
    }


def _steps_beside(saved: Event | None, records: Sequence[Record]) -> list[int]:
    """The steps that began while the checkpoint was being written."""
    if saved is None or saved.step is None:
        return []
    begun = {record["step"]: record["time"] - record["perf/step_ms"] / 1000 for record in records}
    return [step for step, time in begun.items() if step > saved.step and time < saved.time]


def _save(saved: Event | None, records: Sequence[Record], beside: Sequence[float], usual: float) -> SaveCost | None:
    if saved is None or saved.step is None:
        return None
    held = next((each.get("perf/save_ms") or 0.0 for each in records if each["step"] == saved.step + 1), 0.0)
    slower = max(0.0, sum(beside) - len(beside) * usual)
    return SaveCost(held / 1000, slower, saved.time - saved.time_in("taken"))


def _checkpoint_sizes(directory: Path) -> tuple[int | None, int | None]:
    """Bytes of a whole checkpoint, and of one reduced to weights, their manifests included."""
    sizes = {
        found.manifest.kind: found.manifest.bytes + (found.path / MANIFEST).stat().st_size
        for found in scan(directory)
        if found.manifest is not None
    }
    return sizes.get("full"), sizes.get("weights")


def _logs(settings: Settings, records: Sequence[Record], due: Mapping[str, int]) -> tuple[Logs, Logs]:
    """All that grows in the run's directory; and TensorBoard's part of it."""
    steps, run_dir = len(records), settings.run_dir
    events = [piece for file in sorted(settings.tensorboard_dir.glob("events.*")) for piece in read_events(file)]
    metrics = [(record["step"], size) for record, size in zip(records, _line_sizes(run_dir / METRICS), strict=True)]
    samples = [(_number(file.stem), file.stat().st_size) for file in (run_dir / "samples").glob("step_*.md")]
    lines = list(_log_lines(run_dir / "train.log"))
    pieces = [*metrics, *samples, *lines, *events]
    rest = _bytes_below(run_dir) - sum(size for _, size in pieces)
    return _shares([*pieces, (0, rest)], steps, due), _shares(events, steps, due)


def _shares(pieces: Sequence[Piece], steps: int, due: Mapping[str, int]) -> Logs:
    """What is written once, at every step, and more where a hook was due."""
    by_step = [sum(size for at, size in pieces if at == step) for step in range(steps + 1)]
    plain = [size for step, size in enumerate(by_step) if step > 1 and step not in due.values()]
    usual = statistics.fmean(plain[:-1]) if len(plain) > 1 else 0.0  # the last one was told that it is the last
    first = by_step[0] + (max(0.0, by_step[1] - usual) if steps else 0.0)
    return Logs(first, usual, {name: max(0.0, by_step[step] - usual) for name, step in due.items() if step <= steps})


def read_events(file: Path) -> Iterator[Piece]:
    """The events of a TensorBoard file; a record has 16 bytes beside the event: its length and two checksums."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(file)).Load():
        yield int(Event.FromString(record).step), len(record) + 16


def _log_lines(file: Path) -> Iterator[Piece]:
    for line in read_small(file).splitlines(keepends=True):
        found = re.search(rb" step +(\d+)[:/]", line)
        yield int(found[1]) if found else 0, len(line)


def _line_sizes(file: Path) -> list[int]:
    return [len(line) for line in read_small(file).splitlines(keepends=True)]


def _number(stem: str) -> int:
    return int(stem.rsplit("_", 1)[-1])


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
