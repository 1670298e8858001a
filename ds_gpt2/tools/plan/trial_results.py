"""Read the results of a trial from the files of its run and from the records of its ranks."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.common.disk_usage import bytes_below
from ds_gpt2.common.files import read_small
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, Record, read_metrics
from ds_gpt2.tools.plan.trial_rank import RankMemory, read_record
from ds_gpt2.tools.resources.checkpoint_space import Logs

_WARM_UP = 2  # steps that are not measured: buffers, caches, the optimizer's first update

StepBytes = tuple[int, float]  # a step, or 0 for what is written once; bytes written for it


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that has ended, with its files."""

    settings: Settings  # of the trial
    directory: Path  # with the records of the ranks
    ranks: int
    run_accumulation: int  # micro-batches per step of the run
    accumulation: int  # micro-batches per step of the trial
    due: Mapping[str, int]  # the step that each evaluation follows
    start_time: float  # of the ranks, seconds since 1970
    log_sizes: Mapping[int, int]  # bytes of train.log at the beginning of steps, as far as observed


@dataclass(frozen=True)
class SaveCost:
    """The cost of one save."""

    blocked_seconds: float  # that training was blocked
    slowdown_seconds: float  # that the steps during the save took longer
    write_seconds: float  # until the checkpoint was committed


@dataclass(frozen=True)
class TrialResults:
    """The measurements of a trial."""

    steps: int
    accumulation: int  # micro-batches per step of the trial
    start_seconds: float  # from the start of the ranks to the end of the first step
    step_seconds: list[float]  # of steps with all micro-batches of the run, without evaluations and saves
    costs: dict[str, float]  # seconds of one evaluation, by its name
    save: SaveCost | None
    ranks: list[RankMemory]
    checkpoint_bytes: int | None
    weights_bytes: int | None  # of a checkpoint of weights alone
    logs: Logs
    tensorboard: Logs  # the part of ``logs`` that TensorBoard's event files take
    watts: float | None  # of the GPUs
    mfu: float | None  # of the steps of the trial


def read_results(trial: FinishedTrial) -> TrialResults:
    """Return the measurements of a trial."""
    settings = trial.settings
    records = list(read_metrics(settings.run_dir / METRICS))
    seconds = {record["step"]: _step_seconds(record, trial.run_accumulation / trial.accumulation) for record in records}
    saved = next((event for event in read_journal(settings.run_dir) if event.kind == "save"), None)
    during_save = _steps_during_save(saved, records)
    without_save = [took for step, took in seconds.items() if step > _WARM_UP and step not in during_save]
    without_save = without_save or list(seconds.values())
    logs, tensorboard = _logs(trial, records)
    full, weights = _checkpoint_sizes(settings.checkpoint_dir)
    return TrialResults(
        steps=len(records),
        accumulation=trial.accumulation,
        start_seconds=records[0]["time"] - trial.start_time,
        step_seconds=without_save,
        costs=_costs(records, trial.due),
        save=_save_cost(saved, records, [seconds[step] for step in during_save], statistics.fmean(without_save)),
        ranks=[read_record(trial.directory, rank) for rank in range(trial.ranks)],
        checkpoint_bytes=full,
        weights_bytes=weights,
        logs=logs,
        tensorboard=tensorboard,
        watts=_mean([record["perf/gpu_power_w"] for record in records if record.get("perf/gpu_power_w")]),
        mfu=_mean([record["perf/mfu"] for record in records[_WARM_UP:] if record.get("perf/mfu")]),
    )


def _step_seconds(record: Record, factor: float) -> float:
    """Return the seconds that the step would have taken with ``factor`` times as many micro-batches."""
    forward_backward = record.get("perf/forward_backward_ms") or 0.0
    return float(record["perf/step_ms"] + (factor - 1) * forward_backward) / 1000


def _costs(records: Sequence[Record], due: Mapping[str, int]) -> dict[str, float]:
    """Return the seconds of each evaluation; the record of a step contains the evaluation after the step before."""
    by_step = {record["step"]: record for record in records}
    return {
        name: float(by_step[step + 1].get("perf/eval_ms") or 0.0) / 1000
        for name, step in due.items()
        if step + 1 in by_step
    }


def _steps_during_save(saved: Event | None, records: Sequence[Record]) -> list[int]:
    """Return the steps that started while the checkpoint was being written."""
    if saved is None or saved.step is None:
        return []
    starts = {record["step"]: record["time"] - record["perf/step_ms"] / 1000 for record in records}
    return [step for step, time in starts.items() if step > saved.step and time < saved.time]


def _save_cost(
    saved: Event | None, records: Sequence[Record], during_save: Sequence[float], typical: float
) -> SaveCost | None:
    """Return the cost of the save.

    Args:
        during_save: seconds of the steps during the save.
        typical: mean seconds of a step without a save.
    """
    if saved is None or saved.step is None:
        return None
    blocked_ms = next((each.get("perf/save_ms") or 0.0 for each in records if each["step"] == saved.step + 1), 0.0)
    slowdown = max(0.0, sum(during_save) - len(during_save) * typical)
    return SaveCost(blocked_ms / 1000, slowdown, saved.time - saved.time_in("taken"))


def _checkpoint_sizes(directory: Path) -> tuple[int | None, int | None]:
    """Return the bytes of a full checkpoint and of one of weights alone, including their manifests."""
    sizes = {
        found.manifest.kind: found.manifest.bytes + (found.path / MANIFEST).stat().st_size
        for found in scan(directory)
        if found.manifest is not None
    }
    return sizes.get("full"), sizes.get("weights")


def _logs(trial: FinishedTrial, records: Sequence[Record]) -> tuple[Logs, Logs]:
    """Return the growth of the run's directory, and the part of it that TensorBoard's event files take."""
    settings, due = trial.settings, trial.due
    steps, run_dir = len(records), settings.run_dir
    events = [piece for file in sorted(settings.tensorboard_dir.glob("events.*")) for piece in read_events(file)]
    metrics = [(record["step"], size) for record, size in zip(records, _line_sizes(run_dir / METRICS), strict=True)]
    samples = [(_number(file.stem), file.stat().st_size) for file in (run_dir / "samples").glob("step_*.md")]
    pieces = [*metrics, *samples, *_log_growth(trial.log_sizes), *events]
    rest = bytes_below(run_dir) - sum(size for _, size in pieces)  # includes the log before the first step
    return _shares([*pieces, (0, rest)], steps, due), _shares(events, steps, due)


def _shares(pieces: Sequence[StepBytes], steps: int, due: Mapping[str, int]) -> Logs:
    """Return what is written once, at every step, and additionally for each evaluation."""
    by_step = [sum(size for at, size in pieces if at == step) for step in range(steps + 1)]
    plain = [size for step, size in enumerate(by_step) if step > 1 and step not in due.values()]
    typical = statistics.fmean(plain[:-1]) if len(plain) > 1 else 0.0  # the last step of a run writes more
    first = by_step[0] + (max(0.0, by_step[1] - typical) if steps else 0.0)
    return Logs(
        first, typical, {name: max(0.0, by_step[step] - typical) for name, step in due.items() if step <= steps}
    )


def read_events(file: Path) -> Iterator[StepBytes]:
    """Yield the step and size of each event in a TensorBoard file.

    A record has 16 bytes in addition to the event: its length and two checksums.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent

    for record in RawEventFileLoader(str(file)).Load():
        yield int(TensorBoardEvent.FromString(record).step), len(record) + 16


def _log_growth(sizes: Mapping[int, int]) -> Iterator[StepBytes]:
    """Yield the growth of a log from each step to the next.

    Args:
        sizes: bytes at the beginning of steps. Growth over several steps is divided equally among them.
    """
    for (first, size), (following, next_size) in itertools.pairwise(sorted(sizes.items())):
        for step in range(first, following):
            yield step, (next_size - size) / (following - first)


def _line_sizes(file: Path) -> list[int]:
    return [len(line) for line in read_small(file).splitlines(keepends=True)]


def _number(stem: str) -> int:
    return int(stem.rsplit("_", 1)[-1])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
