"""What a person sees: one line a step, a bar on a terminal, and the same lines in the run's log file."""

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
    """Send the project's messages to the terminal and to ``file``; ranks other than 0 only speak of trouble."""
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
        except OSError as error:  # a run is worth more than its log
            log.warning(f"cannot write {file}: {error.strerror}; training continues")
            return
        to_file.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)


class _LogFile(logging.Handler):
    """Appends to ``train.log``. Lines that cannot be written are lost and reported: on the terminal, and here later."""

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
    """Shows each step: a line in the log, a progress bar instead where a person watches a terminal."""

    def __init__(self, start_step: int, steps: int) -> None:
        watched = collectives.is_main() and sys.stdout.isatty()
        self._steps = steps
        self._bar: tqdm[NoReturn] | None = None
        if watched:
            self._bar = tqdm(total=steps, initial=start_step, file=sys.stdout, dynamic_ncols=True, bar_format=_BAR)

    def show(self, step: int, seen: StepMetrics, eta_seconds: float) -> None:
        """One step, from the values that go to the monitor."""
        numbers = _numbers(seen)
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
    """Prints above a progress bar if there is one; a step that a bar shows needs no line of its own."""

    gone = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.gone or getattr(record, "bar", None) is not None:
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except OSError:  # the terminal is closed or the pipe broken; the run and its log file go on
            self.gone = True


def _numbers(seen: StepMetrics) -> str:
    parts = [
        f"loss {seen['train/loss']:.4f}",
        f"lr {seen['train/lr']:.2e}",
        f"grad {seen['train/grad_norm']:.3f}",
        f"{seen['perf/step_ms']:,.0f} ms",
        f"{seen['perf/tokens_per_s']:,.0f} tok/s",
    ]
    if isinstance(mfu := seen.get("perf/mfu"), float):
        parts.append(f"mfu {100 * mfu:.1f}%")
    if seen["train/skipped_steps"]:
        parts.append(f"skipped {seen['train/skipped_steps']:.0f}")
    return "  ".join(parts)
