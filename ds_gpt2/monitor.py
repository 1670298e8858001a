"""Where the numbers go: DeepSpeed's monitor (TensorBoard, and W&B, Comet or CSV by its config) and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ds_gpt2 import dist
from ds_gpt2.engine import Engine

Seen = dict[str, float | str]  # what was observed at a step: scalars and texts by tag

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
            _forget_after(metrics_file, start_step)
            self._file = metrics_file.open("a", encoding="utf-8")
            self._restart_tensorboard(start_step)

    def write(self, step: int, seen: Seen) -> None:
        """Record ``seen`` under ``step``."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **_json_fit(seen)}, ensure_ascii=False) + "\n")
        writer = self._tensorboard()
        for tag, value in seen.items():
            if not isinstance(value, str):
                self._events.append((tag, value, step))
            elif writer is not None:
                writer.add_text(tag, _as_code_block(value), step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._file is None:
            return
        self._file.flush()
        if self._events:
            self._backends.write_events(self._events)
            self._events = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        if (writer := self._tensorboard()) is not None:
            writer.close()
        if self._file is not None:
            self._file.close()

    def _tensorboard(self) -> Any:
        monitor = self._backends.tb_monitor
        return monitor.summary_writer if monitor is not None else None

    def _restart_tensorboard(self, start_step: int) -> None:
        """DeepSpeed's writer knows no ``purge_step``: where an earlier start has written, another takes its place."""
        opened = self._tensorboard()
        if opened is None or len(list(Path(opened.log_dir).glob("events.*"))) == 1:
            return  # nothing was written here before
        opened.close()
        self._backends.tb_monitor.summary_writer = type(opened)(log_dir=opened.log_dir, purge_step=start_step + 1)


def _forget_after(metrics_file: Path, step: int) -> None:
    if not metrics_file.exists():
        return
    with metrics_file.open(encoding="utf-8") as lines:
        kept = [line for line in lines if _step_of(line) <= step]
    partial = metrics_file.with_suffix(".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, metrics_file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut by a crash


def _json_fit(seen: Seen) -> dict[str, float | str | None]:
    """JSON has no word for infinity or NaN."""
    return {tag: None if _is_odd(value) else value for tag, value in seen.items()}


def _is_odd(value: float | str) -> bool:
    return not isinstance(value, str) and not math.isfinite(value)


def _as_code_block(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
