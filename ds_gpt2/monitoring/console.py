"""Console output: one line per step, or a progress bar on a terminal; the same lines go to the run's log file."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from ds_gpt2.common.files import open_for_writing, write_all
from ds_gpt2.common.formatting import counted, duration
from ds_gpt2.common.terminal import LineFormatter
from ds_gpt2.distributed import collectives
from ds_gpt2.monitoring.monitor import StepMetrics

log = logging.getLogger("ds_gpt2")


def open_log(file: Path | None) -> None:
    """Send the project's messages to the terminal and to ``file``; ranks other than 0 print errors only."""
    log.setLevel(logging.INFO if collectives.is_main() else logging.ERROR)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    terminal = _Terminal()
    terminal.setFormatter(LineFormatter("%(message)s"))
    log.addHandler(terminal)
    if file is not None and collectives.is_main():
        try:
            to_file = _LogFile(file)
        except OSError as error:  # a failing log must not end the run
            log.warning(f"cannot write {file}: {error.strerror}; training continues")
            return
        to_file.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)


class _LogFile(logging.Handler):
    """Appends to ``train.log``. Lines that cannot be written are lost; their number is written here later."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = open_for_writing(file, "ab", buffering=0)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._lost:
            line = f"({counted(self._lost, 'line')} could not be written here)\n{line}"
        try:
            write_all(self._file.write, line.encode(errors="backslashreplace") + b"\n")
            self._lost = 0
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                tqdm.write(f"cannot write {self._file.name}: {error.strerror}; training continues", file=sys.stdout)

    def close(self) -> None:
        self._file.close()
        super().close()


class StepLines:
    """Shows each step: a line in the log, and on a terminal a progress bar instead of the line."""

    def __init__(self, start_step: int, steps: int) -> None:
        on_terminal = collectives.is_main() and sys.stdout.isatty()
        self._steps = steps
        self._bar: tqdm[NoReturn] | None = None
        if on_terminal:
            self._bar = tqdm(total=steps, initial=start_step, file=sys.stdout, dynamic_ncols=True, bar_format=_BAR)

    def show(self, step: int, metrics: StepMetrics, eta_seconds: float) -> None:
        """Show one step."""
        numbers = _numbers(metrics)
        width = len(str(self._steps))
        line = f"step {step:{width}d}/{self._steps}  {numbers}  eta {duration(eta_seconds)}"
        log.info(line, extra={"bar": self._bar})
        if self._bar is not None:
            try:
                self._bar.set_description_str(f"{numbers}  eta {duration(eta_seconds)}", refresh=False)
                self._bar.update(1)
            except OSError:
                self._bar = None

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


_BAR = "{n_fmt}/{total_fmt} |{bar:16}| {desc}"


class _Terminal(logging.Handler):
    """Prints above a progress bar if there is one; a step that the bar shows is not printed."""

    closed = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.closed or getattr(record, "bar", None) is not None:
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except OSError:  # the terminal is closed or the pipe broken; the run and its log file continue
            self.closed = True


def _numbers(metrics: StepMetrics) -> str:
    parts = [
        f"loss {metrics['train/loss']:.4f}",
        f"lr {metrics['train/lr']:.2e}",
        f"grad {metrics['train/grad_norm']:.3f}",
        f"{metrics['perf/step_ms']:,.0f} ms",
        f"{metrics['perf/tokens_per_s']:,.0f} tok/s",
    ]
    if isinstance(mfu := metrics.get("perf/mfu"), float):
        parts.append(f"mfu {100 * mfu:.1f}%")
    if metrics["train/skipped_steps"]:
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    return "  ".join(parts)
