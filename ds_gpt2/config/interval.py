"""Intervals in steps, at which evaluations and saves are due."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """An interval in steps; 0 means never."""

    steps: int

    def due(self, step: int, last_step: int) -> bool:
        """Return True at every multiple of ``steps`` and at the last step of the run."""
        return self.steps > 0 and (step % self.steps == 0 or step == last_step)

    def due_steps(self, last_step: int) -> list[int]:
        """Return all steps of a run at which ``due`` is true, ascending."""
        return sorted({*range(self.steps, last_step + 1, self.steps), last_step}) if self.steps else []
