"""What to do after a run has ended: the rules, apart from the processes."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gpt2.config.batch_plan import format_batches
from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.exit_report import CRASHED, DONE, MISTAKE, ROLLBACK, STOPPED, Outcome


@dataclass(frozen=True)
class Ended:
    """How one start of the ranks came to its end."""

    outcome: Outcome
    stop_requested: bool  # by whoever supervises
    step: int  # the newest step that was begun; 0 where none was
    batch: int  # its batch of the data
    from_step: int | None  # the step that it had gone on from; None where it had not, or the journal does not say
    saved_step: int  # of the newest checkpoint there is now; -1 where there is none


@dataclass(frozen=True)
class Finish:
    """No more starts."""

    code: int


@dataclass(frozen=True)
class GiveUp:
    """No more starts, though the run is not done."""

    text: str


@dataclass(frozen=True)
class Again:
    """Start once more."""

    seconds: float  # from now
    resume: str  # see ``catalog.candidates``
    leave_out: tuple[int, ...]  # batches of the data
    text: str


class Restarts:
    """Counts starts that got nowhere. A run gets on when it saves a checkpoint that is newer than any before."""

    def __init__(self, settings: SupervisorSettings, saved_step: int) -> None:
        """
        Args:
            saved_step: of the newest checkpoint before the first start; -1 where there is none.
        """
        self._settings = settings
        self._furthest = saved_step
        self._in_vain = 0
        self._at_one_step = 0
        self._crashed_at: int | None = None
        self._rolled_back = 0  # starts in a row that ended in a rollback

    def after(self, ended: Ended) -> Finish | GiveUp | Again:
        """What comes next."""
        result = ended.outcome
        if result.code in (DONE, STOPPED, MISTAKE) or ended.stop_requested:
            return Finish(CRASHED if result.code == ROLLBACK else result.code)
        self._count(ended)
        if self._in_vain > self._settings.restarts:
            text = f"{self._in_vain} starts in a row got no further: no more restarts"
            if self._rolled_back > 1:
                text += (
                    f"; the last {self._rolled_back} diverged on different data: schedule.max_lr may be too"
                    " high for this model"
                )
            return GiveUp(text)
        seconds = self._backoff()
        if result.code == ROLLBACK and result.before is not None:
            return self._roll_back(result.before, ended.from_step, result.leave_out, seconds)
        if self._at_one_step <= 1 or ended.saved_step < 0 or ended.from_step is None:
            return Again(seconds, "auto", (), "from the newest checkpoint")
        return self._avoid(ended, seconds)

    def _count(self, ended: Ended) -> None:
        self._in_vain = 1 if ended.saved_step > self._furthest else self._in_vain + 1
        self._furthest = max(self._furthest, ended.saved_step)
        self._rolled_back = self._rolled_back + 1 if ended.outcome.code == ROLLBACK else 0
        again = ended.step > 0 and ended.step == self._crashed_at
        self._at_one_step = self._at_one_step + 1 if again else 1
        self._crashed_at = ended.step

    def _backoff(self) -> float:
        longest = self._settings.longest_backoff_seconds
        return min(longest, self._settings.backoff_seconds * 2.0 ** min(self._in_vain - 1, 30))

    def _roll_back(self, before: int, from_step: int | None, leave_out: tuple[int, ...], seconds: float) -> Again:
        """To a checkpoint of before the trouble; to an older one each time that it comes again at the same step."""
        if self._at_one_step > 1 and from_step is not None:
            before = min(before, from_step)
        text = f"from the newest checkpoint before step {before}"
        if leave_out:
            text += f", without batches {format_batches(leave_out)} of the data"
        return Again(seconds, f"before:{before}", leave_out, text)

    def _avoid(self, ended: Ended, seconds: float) -> Again:
        """The same step again and again: first the checkpoint is suspected, then the data."""
        if self._at_one_step == 2:
            return Again(seconds, f"before:{ended.from_step}", (), "from an older checkpoint")
        if self._settings.skip_data:
            return Again(seconds, "auto", (ended.batch,), f"without batch {ended.batch} of the data")
        text = (
            f"batch {ended.batch} of the data may be the cause; supervisor.skip_data=true would leave it out:"
            " from the newest checkpoint once more"
        )
        return Again(seconds, "auto", (), text)
