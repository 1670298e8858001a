"""Decide what to do after a launch of the ranks has ended: only the rules, without processes."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.config.batch_plan import format_batches
from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.exit_codes import CRASHED, DONE, MISTAKE, ROLLBACK, STOPPED
from ds_gpt2.run_dir.exit_report import Outcome


@dataclass(frozen=True)
class LaunchResult:
    """How one launch of the ranks ended."""

    outcome: Outcome
    stop_requested: bool  # of the supervisor
    step: int  # the newest step that began; 0 if none did
    batch: int  # the batch of the data of that step
    from_step: int | None  # the step that the launch resumed from; None if no step began or the journal has no record
    saved_step: int  # of the newest checkpoint now; -1 if there is none
    lost_hosts: tuple[str, ...] = ()  # hosts of several that stopped responding, which ended the launch


@dataclass(frozen=True)
class Finish:
    """Do not launch again: the run is done or was stopped."""

    code: int


@dataclass(frozen=True)
class GiveUp:
    """Do not launch again, although the run is not done."""

    text: str


@dataclass(frozen=True)
class Restart:
    """Launch again."""

    seconds: float  # from now
    resume: str  # see ``catalog.candidates``
    leave_out: tuple[int, ...]  # batches of the data
    text: str


class RestartPolicy:
    """Counts launches without progress. A launch makes progress if it saves a checkpoint newer than all before."""

    def __init__(self, settings: SupervisorSettings, saved_step: int) -> None:
        """
        Args:
            saved_step: of the newest checkpoint before the first launch; -1 if there is none.
        """
        self._settings = settings
        self._newest_saved_step = saved_step
        self._without_progress = 0  # launches in a row
        self._at_same_step = 0  # launches in a row that ended at the same step
        self._last_step: int | None = None
        self._rollbacks = 0  # launches in a row that ended in a rollback
        self._host_losses = 0  # launches in a row without progress that ended in the loss of a host

    def decide(self, result: LaunchResult) -> Finish | GiveUp | Restart:
        """Return what to do after a launch that ended with ``result``."""
        outcome = result.outcome
        if outcome.code in (DONE, STOPPED, MISTAKE) or result.stop_requested:
            return Finish(CRASHED if outcome.code == ROLLBACK else outcome.code)
        if result.lost_hosts and outcome.code != ROLLBACK:
            return self._continue_without(result)
        self._count(result)
        if self._without_progress > self._settings.restarts:
            return GiveUp(self._give_up_text())
        seconds = self._backoff(self._without_progress)
        if outcome.code == ROLLBACK and outcome.before is not None:
            return self._roll_back(outcome.before, result, seconds)
        if self._at_same_step <= 1 or result.saved_step < 0 or result.from_step is None:
            text = "from the beginning" if result.saved_step < 0 else "from the newest checkpoint"
            return Restart(seconds, "auto", (), text)
        return self._avoid_step(result, seconds)

    def _continue_without(self, result: LaunchResult) -> Restart:
        """Handle the loss of a host: that is no launch without progress, but a host may be lost again and again."""
        self._host_losses = 1 if result.saved_step > self._newest_saved_step else self._host_losses + 1
        self._newest_saved_step = max(self._newest_saved_step, result.saved_step)
        text = "from the beginning" if result.saved_step < 0 else "from the newest checkpoint"
        return Restart(self._backoff(self._host_losses), "auto", (), f"{text} on the hosts that answer")

    def _count(self, result: LaunchResult) -> None:
        self._without_progress = 1 if result.saved_step > self._newest_saved_step else self._without_progress + 1
        self._newest_saved_step = max(self._newest_saved_step, result.saved_step)
        self._rollbacks = self._rollbacks + 1 if result.outcome.code == ROLLBACK else 0
        is_same_step = result.step > 0 and result.step == self._last_step
        self._at_same_step = self._at_same_step + 1 if is_same_step else 1
        self._last_step = result.step

    def _give_up_text(self) -> str:
        text = f"giving up: {self._without_progress} starts in a row made no progress (no newer checkpoint)"
        if self._rollbacks > 1:
            text += f"; the last {self._rollbacks} diverged on different data: schedule.max_lr may be too high"
        return text

    def _backoff(self, launches: int) -> float:
        """Return the seconds until the next launch: twice as long after each launch without progress, up to a limit."""
        longest = self._settings.longest_backoff_seconds
        return min(longest, self._settings.backoff_seconds * 2.0 ** min(launches - 1, 30))

    def _roll_back(self, before: int, result: LaunchResult, seconds: float) -> Restart:
        """Resume from a checkpoint before the divergence; from an older one each time it recurs at the same step."""
        leave_out = result.outcome.leave_out
        if self._at_same_step > 1 and result.from_step is not None:
            before = min(before, result.from_step)
        text = "from the beginning" if result.saved_step < 0 else f"from the newest checkpoint before step {before:,}"
        if leave_out:
            text += f", excluding batches {format_batches(leave_out)} of the data"
        return Restart(seconds, f"before:{before}", leave_out, text)

    def _avoid_step(self, result: LaunchResult, seconds: float) -> Restart:
        """Handle repeated crashes at one step: at first the checkpoint may be the cause, then the data."""
        if self._at_same_step == 2:
            return Restart(seconds, f"before:{result.from_step}", (), "from an older checkpoint")
        if self._settings.skip_data:
            text = f"from the newest checkpoint, excluding batch {result.batch} of the data"
            return Restart(seconds, "auto", (result.batch,), text)
        text = (
            f"from the newest checkpoint; batch {result.batch} of the data may be the cause of the crashes:"
            " supervisor.skip_data=true would exclude it"
        )
        return Restart(seconds, "auto", (), text)
