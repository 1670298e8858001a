"""Where the numbers go: DeepSpeed's monitor (TensorBoard, and W&B, Comet or CSV by its config) and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ds_gpt2 import dist, metrics
from ds_gpt2.engine import Engine


@dataclass(frozen=True)
class Histogram:
    """How many values fell into each bucket."""

    limits: list[float]  # upper edges of the buckets, ascending
    counts: list[float]
    minimum: float
    maximum: float
    total: float  # sum of the values
    squares: float  # sum of their squares


Seen = dict[str, float | str | Histogram]  # what was observed at a step: scalars, texts and histograms by tag

_FLUSH_SECONDS = 10.0


class Monitor:
    """Writes what was seen at a step, on rank 0; on the other ranks it does nothing."""

    def __init__(self, engine: Engine, metrics_file: Path, start_step: int) -> None:
        """
        Args:
            start_step: the step this process starts from; anything recorded beyond it is about to be replayed and
                is dropped, so that curves neither overlap nor jump back.
        """
        self._backends = engine.deepspeed.monitor
        self._events: list[tuple[str, float, int]] = []
        self._flushed = time.monotonic()
        self._file: TextIO | None = None
        if dist.is_main():
            metrics.forget_after(metrics_file, start_step)
            self._file = metrics_file.open("a", encoding="utf-8")
            self._restart_tensorboard(start_step)

    @property
    def tensorboard(self) -> Any:
        """torch's SummaryWriter; None where TensorBoard is off, and on ranks other than 0."""
        backend = self._backends.tb_monitor
        return backend.summary_writer if backend is not None and self._file is not None else None

    def write(self, step: int, seen: Seen) -> None:
        """Record ``seen`` under ``step``; histograms go to TensorBoard alone."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **_json_fit(seen)}, ensure_ascii=False) + "\n")
        for tag, value in seen.items():
            if isinstance(value, float | int):
                self._events.append((tag, value, step))
            elif self.tensorboard is not None:
                self._show(tag, value, step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Hand everything to the operating system; ``durable``: and the records to the disk, as a checkpoint is."""
        if self._file is None:
            return
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())
        if self._events:
            self._backends.write_events(self._events)
            self._events = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self._file is not None:
            self._file.close()

    def _show(self, tag: str, value: str | Histogram, step: int) -> None:
        if isinstance(value, str):
            self.tensorboard.add_text(tag, as_code_block(value), step)
            return
        self.tensorboard.add_histogram_raw(
            tag,
            min=value.minimum,
            max=value.maximum,
            num=sum(value.counts),
            sum=value.total,
            sum_squares=value.squares,
            bucket_limits=value.limits,
            bucket_counts=value.counts,
            global_step=step,
        )

    def _restart_tensorboard(self, start_step: int) -> None:
        """DeepSpeed's writer knows no ``purge_step``: where an earlier start has written, another takes its place."""
        opened = self.tensorboard
        if opened is None or len(list(Path(opened.log_dir).glob("events.*"))) == 1:
            return  # nothing was written here before
        opened.close()
        self._backends.tb_monitor.summary_writer = type(opened)(log_dir=opened.log_dir, purge_step=start_step + 1)


def as_code_block(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])


def _json_fit(seen: Seen) -> dict[str, float | str | None]:
    """JSON has no word for infinity or NaN."""
    fit: dict[str, float | str | None] = {}
    for tag, value in seen.items():
        if isinstance(value, str):
            fit[tag] = value
        elif not isinstance(value, Histogram):
            fit[tag] = value if math.isfinite(value) else None
    return fit
