"""Where the numbers go: metrics.jsonl, and DeepSpeed's monitors (TensorBoard, and W&B, Comet or CSV by its config).

TensorBoard's writer is the one that DeepSpeed opens, but is given all scalars of a step as one event, under the time
of the step: DeepSpeed's own way, an event a scalar, takes ten times as long.
"""

from __future__ import annotations

import contextlib
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
from ds_gpt2.engine.engine import Engine
from ds_gpt2.monitoring.trackers import Tracker, finish
from ds_gpt2.run_dir.metrics import MetricsFile, drop_after

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histogram:
    """How many values fell into each bucket."""

    limits: list[float]  # upper edges of the buckets, ascending
    counts: list[float]
    minimum: float
    maximum: float
    total: float  # sum of the values
    squares: float  # sum of their squares


StepMetrics = dict[str, float | str | Histogram]  # what was observed at a step: scalars, texts and histograms by tag


def to_plain(seen: StepMetrics) -> dict[str, Any]:
    """``seen`` as JSON can hold it; numbers that are not finite become None."""
    return {tag: _plain(value) for tag, value in seen.items()}


def from_plain(plain: Mapping[str, Any]) -> StepMetrics:
    """The inverse of ``to_plain``; None becomes infinity, and fields of newer versions are ignored."""
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
    seen: StepMetrics

    @property
    def scalars(self) -> dict[str, float]:
        return {tag: value for tag, value in self.seen.items() if isinstance(value, float | int)}


_SERVICES = ("wandb_monitor", "csv_monitor", "comet_monitor")  # DeepSpeed's monitors besides TensorBoard
_FLUSH_SECONDS = 10.0
_MOST_TO_SHOW = 10_000  # steps that wait for TensorBoard
_SHOW = "write TensorBoard's events"


class Monitor:
    """Writes what was seen at a step, on rank 0; on the other ranks it does nothing.

    A full disk or a service that is away is said once and costs no step: records wait for room, TensorBoard's values
    too; other services miss what came meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        metrics_file: Path,
        recorded_step: int,
        trackers: Mapping[str, Tracker] | None = None,
        reserve: Callable[[], Path] | None = None,
    ) -> None:
        """
        Args:
            recorded_step: the newest step whose record stays; anything recorded beyond it is about to be recorded
                again and is dropped, so that curves neither overlap nor jump back.
            trackers: by the name of the DeepSpeed monitor that each replaces.
            reserve: see ``MetricsFile``.
        """
        self._master = engine.deepspeed.monitor
        self._trackers = dict(trackers or {})
        for name, tracker in self._trackers.items():
            setattr(self._master, name, tracker)
        self._pending: list[_AtStep] = []  # since the last flush
        self._to_show: list[_AtStep] = []  # TensorBoard could not be given it yet
        self._flushed = time.monotonic()
        self._failing: set[str] = set()
        self._records: MetricsFile | None = None
        if collectives.is_main():
            drop_after(metrics_file, recorded_step, reserve() if reserve is not None else None)
            self._records = MetricsFile(metrics_file, reserve, recorded_step)
            self._continue_csv()
            if self.tensorboard is not None:
                _silence_writer_thread()
                self._events = OpenDirectory(Path(self.tensorboard.log_dir))
            if self._has_written_before():
                self._reopen_tensorboard(recorded_step + 1)

    @property
    def tensorboard(self) -> Any:
        """torch's SummaryWriter; None where TensorBoard is off, and on ranks other than 0."""
        backend = self._master.tb_monitor
        return backend.summary_writer if backend is not None and self._records is not None else None

    def write(self, step: int, seen: StepMetrics) -> None:
        """Record ``seen`` under ``step``; histograms go to TensorBoard alone."""
        if self._records is None:
            return
        now = round(time.time(), 3)
        without_histograms: StepMetrics = {
            tag: value for tag, value in seen.items() if not isinstance(value, Histogram)
        }
        self._records.append({"step": step, "time": now, **to_plain(without_histograms)})
        self._pending.append(_AtStep(step, now, seen))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Hand everything to the operating system; ``durable``: and the records to the disk, as a checkpoint is."""
        records = self._records
        if records is None:
            return
        self._flushed = time.monotonic()
        self.attempt(f"write {records.file}", lambda: records.flush(durable))
        seen, self._pending = self._pending, []
        if not seen:
            return
        scalars = [(tag, value, one.step) for one in seen for tag, value in one.scalars.items()]
        for name in _SERVICES:
            if (backend := getattr(self._master, name, None)) is not None:
                self.attempt(f"write to {name}", functools.partial(backend.write_events, scalars))
        if self.tensorboard is not None:
            self._to_show = [*self._to_show, *seen][-_MOST_TO_SHOW:]
            if self.attempt(_SHOW, self._show):
                self._to_show = []

    def mark_start(self, step: int, what: str) -> None:
        """Say on TensorBoard's text page that a process began at ``step``; the records know nothing of processes."""
        if self._records is not None:
            self._pending.append(_AtStep(step, time.time(), {"marks/start": what}))

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Whether ``action`` worked; the first of several failures in a row is said, and the end of them."""
        try:
            action()
        except Exception as error:  # from whatever library writes there; none of it is worth a run
            if what not in self._failing:
                self._failing.add(what)
                log.warning(f"cannot {what}: {error}; training goes on, and it is tried again")
            return False
        if what in self._failing:
            self._failing.discard(what)
            log.info(f"could {what} again")
        return True

    def close(self, failed: bool = False) -> None:
        """Write what is left and finish everything; a second call does nothing. Takes a limited time.

        Args:
            failed: the run ends with an error; W&B shows that.
        """
        records = self._records
        if records is None:
            return
        self.flush(durable=True)
        if records.unsaved:
            log.error(f"{counted(records.unsaved, 'record')} cannot be written to {records.file}: lost")
        if self.tensorboard is not None:
            self.attempt("close TensorBoard's events", self.tensorboard.close)
        self._records = None
        records.close()
        finish(self._trackers.values(), failed)

    def _show(self) -> None:
        # The writer opens its file by name at each write. Its thread does not survive an error; nothing comes twice.
        if _SHOW in self._failing or self._events.is_moved or self._events.is_deleted:
            self._reopen_tensorboard(self._to_show[0].step)
        for one in self._to_show:
            _add_to(self.tensorboard, one)
        self.tensorboard.flush()

    def _continue_csv(self) -> None:
        """DeepSpeed's CSV monitor writes the header of a file once per process: name the files that have one."""
        backend: Any = getattr(self._master, "csv_monitor", None)
        if (directory := getattr(backend, "log_dir", None)) is not None:
            backend.filenames += [file.stem for file in Path(directory).glob("*.csv") if file.stat().st_size]

    def _has_written_before(self) -> bool:
        opened = self.tensorboard
        return opened is not None and len(list(Path(opened.log_dir).glob("events.*"))) > 1

    def _reopen_tensorboard(self, purge_step: int) -> None:
        """A new writer in the place of DeepSpeed's, which knows no ``purge_step``: what it shows from there on goes."""
        opened, directory = self.tensorboard, self._events.path
        with contextlib.suppress(OSError):
            opened.close()
        if not directory.parent.is_dir():  # the writer would make it: a run that was deleted
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory.parent))
        self._master.tb_monitor.summary_writer = type(opened)(log_dir=str(directory), purge_step=purge_step)
        self._events = OpenDirectory(directory)


def _silence_writer_thread() -> None:
    """TensorBoard's thread raises what it also hands to the next write, which reports it: no traceback is printed."""
    usual = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            usual(failure)

    threading.excepthook = report


def _add_to(writer: Any, one: _AtStep) -> None:
    scalars = one.scalars
    if scalars:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.file_writer.add_summary(Summary(value=values), one.step, one.time)
    for tag, value in one.seen.items():
        if isinstance(value, str):
            writer.add_text(tag, as_code_block(value), one.step, one.time)
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
                global_step=one.step,
                walltime=one.time,
            )


def as_code_block(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
