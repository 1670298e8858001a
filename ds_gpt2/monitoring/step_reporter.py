"""Report the progress of each step to the heartbeat, the step timer, the console and the monitor."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.monitoring.console import StepLines
from ds_gpt2.monitoring.monitor import Monitor, StepMetrics
from ds_gpt2.monitoring.step_timer import StepTimer
from ds_gpt2.run_dir.heartbeat import Heartbeat, Phase


@dataclass(frozen=True)
class StepReporter:
    """The parts that report the steps of a run of ``steps`` steps."""

    heartbeat: Heartbeat
    timer: StepTimer
    lines: StepLines
    monitor: Monitor
    steps: int

    def begin_step(self, step: int, batch: int) -> None:
        self.timer.begin()
        self.heartbeat.begin_step(step, batch)

    def enter(self, phase: Phase) -> None:
        """Report in the heartbeat that this rank enters ``phase``."""
        self.heartbeat.enter(phase)

    def end_phase(self, name: str) -> None:
        """End the phase ``name`` of the step's time; it began where the previous one ended."""
        self.timer.mark(name)

    def end_step(self, step: int, metrics: StepMetrics) -> None:
        """End the timing of ``step``, add ``perf/*`` to ``metrics``, and show them on the console."""
        metrics |= self.timer.end(step)
        self.lines.show(step, metrics, self.timer.eta(step, self.steps))

    def record(self, step: int, metrics: StepMetrics) -> None:
        self.monitor.write(step, metrics)

    def sync_records(self) -> None:
        """Write all records to the disk, as durably as a checkpoint."""
        self.monitor.flush(durable=True)
