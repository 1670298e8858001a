"""Write the metrics of each step to metrics.jsonl and to DeepSpeed's monitors (TensorBoard, W&B, Comet, CSV).

TensorBoard's writer is the one that DeepSpeed opens. All scalars of a step go to it as one event with the time of the
step; DeepSpeed's monitor writes one event per scalar, which takes ten times as long.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from ds_gpt2.common.formatting import counted
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.monitors import Monitors
from ds_gpt2.monitoring.trackers import Tracker, finish
from ds_gpt2.run_dir.metrics import MetricsFile, drop_after

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histogram:
    """Counts of values per bucket."""

    limits: list[float]  # upper edges of the buckets, ascending
    counts: list[float]
    minimum: float
    maximum: float
    total: float  # sum of the values
    squares: float  # sum of their squares


StepMetrics = dict[str, float | str | Histogram]  # of one step: scalars, texts and histograms by tag


def to_plain(metrics: StepMetrics) -> dict[str, Any]:
    """Return ``metrics`` as values that JSON can represent; NaN and infinity become None."""
    return {tag: _plain(value) for tag, value in metrics.items()}


def from_plain(plain: Mapping[str, Any]) -> StepMetrics:
    """Invert ``to_plain``; None becomes infinity, and fields of newer versions are ignored."""
    return {tag: _from_plain(value) for tag, value in plain.items()}


def _from_plain(value: Any) -> float | str | Histogram:
    if isinstance(value, dict):
        return Histogram(**{field.name: value[field.name] for field in fields(Histogram)})
    return math.inf if value is None else value


def _plain(value: float | str | Histogram) -> float | str | dict[str, Any] | None:
    if isinstance(value, Histogram):
        return asdict(value)
    return value if isinstance(value, str) or math.isfinite(value) else None


@dataclass(frozen=True)
class _AtStep:
    step: int
    time: float  # seconds since 1970
    metrics: StepMetrics

    @property
    def scalars(self) -> dict[str, float]:
        return {tag: value for tag, value in self.metrics.items() if isinstance(value, float | int)}


_FLUSH_SECONDS = 10.0
_MAX_WAITING = 10_000  # steps that wait for TensorBoard
_SHOW = "write TensorBoard's events"


class Monitor:
    """Writes the metrics of each step on rank 0; does nothing on the other ranks.

    A full disk or an unavailable service is logged once and never stops training: records and TensorBoard's values
    wait until they can be written; other services miss the values of that time.
    """

    def __init__(
        self,
        monitors: Monitors,
        metrics_file: Path,
        recorded_step: int,
        trackers: Mapping[str, Tracker] | None = None,
        fallback_file: Callable[[], Path] | None = None,
    ) -> None:
        """
        Args:
            recorded_step: the newest step whose record is retained. Later steps are about to be trained and recorded
                again: their records are dropped, so that curves do not overlap.
            trackers: by the name of the DeepSpeed monitor that each replaces.
            fallback_file: see ``MetricsFile``.
        """
        self._monitors = monitors
        self._trackers = dict(trackers or {})
        for name, tracker in self._trackers.items():
            monitors.replace(name, tracker)
        self._pending: list[_AtStep] = []  # since the last flush
        self._waiting: list[_AtStep] = []  # not written to TensorBoard yet
        self._flushed = time.monotonic()
        self._failing: set[str] = set()
        self._records: MetricsFile | None = None
        if collectives.is_main():
            drop_after(metrics_file, recorded_step, fallback_file() if fallback_file is not None else None)
            self._records = MetricsFile(metrics_file, fallback_file, recorded_step)
            monitors.continue_csv()
            if self.tensorboard is not None:
                _silence_writer_thread()
                self._events = OpenDirectory(Path(self.tensorboard.log_dir))
            if self._has_written_before():
                self._reopen_tensorboard(recorded_step + 1)

    @property
    def tensorboard(self) -> Any:
        """torch's SummaryWriter; None if TensorBoard is off, and on ranks other than 0."""
        return self._monitors.tensorboard if self._records is not None else None

    def write(self, step: int, metrics: StepMetrics) -> None:
        """Record the metrics of ``step``; histograms go to TensorBoard only."""
        if self._records is None:
            return
        now = round(time.time(), 3)
        without_histograms: StepMetrics = {
            tag: value for tag, value in metrics.items() if not isinstance(value, Histogram)
        }
        self._records.append({"step": step, "time": now, **to_plain(without_histograms)})
        self._pending.append(_AtStep(step, now, metrics))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write all pending values.

        Args:
            durable: sync the records to the disk, like a checkpoint.
        """
        records = self._records
        if records is None:
            return
        self._flushed = time.monotonic()
        self.attempt(f"write {records.file}", lambda: records.flush(durable))
        pending, self._pending = self._pending, []
        if not pending:
            return
        scalars = [(tag, value, each.step) for each in pending for tag, value in each.scalars.items()]
        for name, service in self._monitors.services.items():
            self.attempt(f"write to {name}", functools.partial(service.write_events, scalars))
        if self.tensorboard is not None:
            self._waiting = [*self._waiting, *pending][-_MAX_WAITING:]
            if self.attempt(_SHOW, self._show):
                self._waiting = []

    def mark_start(self, step: int, text: str) -> None:
        """Write to TensorBoard's text page that a process started at ``step``; metrics.jsonl has no such entry."""
        if self._records is not None:
            self._pending.append(_AtStep(step, time.time(), {"marks/start": text}))

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Return whether ``action`` succeeded; log the first of several failures in a row, and the recovery.

        Args:
            what: for the log, as in "cannot write FILE".
        """
        try:
            action()
        except Exception as error:  # libraries raise exceptions of many types; none may stop training
            if what not in self._failing:
                self._failing.add(what)
                log.warning(f"cannot {what}: {error}; training continues and retries")
            return False
        if what in self._failing:
            self._failing.discard(what)
            log.info(f"recovered: can {what} again")
        return True

    def close(self, failed: bool = False) -> None:
        """Write all pending values and finish all trackers, within a time limit; a second call does nothing.

        Args:
            failed: the run ends with an error; W&B shows it.
        """
        records = self._records
        if records is None:
            return
        self.flush(durable=True)
        if records.unsaved:
            log.error(f"{counted(records.unsaved, 'record')} could not be written to {records.file} and are lost")
        if self.tensorboard is not None:
            self.attempt("close TensorBoard's events", self.tensorboard.close)
        self._records = None
        records.close()
        finish(self._trackers.values(), failed)

    def _show(self) -> None:
        # The writer opens its file by name at each write, and its thread does not survive an error.
        if _SHOW in self._failing or self._events.is_moved or self._events.is_deleted:
            self._reopen_tensorboard(self._waiting[0].step)
        for each in self._waiting:
            _add_to(self.tensorboard, each)
        self.tensorboard.flush()

    def _has_written_before(self) -> bool:
        opened = self.tensorboard
        return opened is not None and len(list(Path(opened.log_dir).glob("events.*"))) > 1

    def _reopen_tensorboard(self, purge_step: int) -> None:
        """Open a new writer; TensorBoard then hides older events from ``purge_step`` on.

        Raises:
            FileNotFoundError: the run's directory was deleted; the writer would create it again.
        """
        directory = self._events.path
        if not directory.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory.parent))
        self._monitors.reopen_tensorboard(directory, purge_step)
        self._events = OpenDirectory(directory)


def _silence_writer_thread() -> None:
    """Print no traceback of TensorBoard's thread: the next write raises the same error, and reports it."""
    default = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            default(failure)

    threading.excepthook = report


def _add_to(writer: Any, entry: _AtStep) -> None:
    scalars = entry.scalars
    if scalars:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.file_writer.add_summary(Summary(value=values), entry.step, entry.time)
    for tag, value in entry.metrics.items():
        if isinstance(value, str):
            writer.add_text(tag, as_code_block(value), entry.step, entry.time)
        elif isinstance(value, Histogram):
            writer.add_histogram_raw(
                tag,
                min=value.minimum,
                max=value.maximum,
                num=sum(value.counts),
                sum=value.total,
                sum_squares=value.squares,
                bucket_limits=value.limits,
                bucket_counts=value.counts,
                global_step=entry.step,
                walltime=entry.time,
            )


def as_code_block(text: str) -> str:
    """Return Markdown that shows ``text`` unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
