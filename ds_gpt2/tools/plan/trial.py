"""Run a few real steps of the run in a temporary directory, and measure them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.settings import LOG, Settings
from ds_gpt2.monitoring.pace import evaluation_intervals
from ds_gpt2.run_dir import exit_codes, stop_request
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.tools.plan import trial_rank
from ds_gpt2.tools.plan.trial_directory import trial_directory
from ds_gpt2.tools.plan.trial_results import FinishedTrial, TrialResults, read_results

LEAST_STEPS = 10  # some steps to warm up, and some during a save; many evaluations need more, see ``plan_trial``

_SLOW_FRACTION = 8  # a first step that takes more than this fraction of the time is shortened
_SLOW_ACCUMULATION = 2  # micro-batches per step: the least with gradient sums of earlier micro-batches in memory
_LEAST_STEPS_IN_TIME = 3  # the time limit applies only after this many steps
_POLL_SECONDS = 0.05


class TrialError(Exception):
    """The trial failed, and not because of a user error; the message is the reason."""


@dataclass(frozen=True)
class Limits:
    """The size of a trial."""

    steps: int = 16
    seconds: float = 120.0  # from the first step on


@dataclass(frozen=True)
class Trial:
    """The run to try, and how much of it."""

    config: Path
    overrides: Mapping[str, str]  # of the settings in ``config``
    settings: Settings  # those of ``config`` and ``overrides``
    batch: BatchPlan
    layout: RankLayout
    limits: Limits
    report: Callable[[str], None]  # called with the progress, as one line


@dataclass(frozen=True)
class TrialSchedule:
    """The steps of a trial."""

    steps: int
    accumulation: int  # micro-batches per step
    due: Mapping[str, int] = field(default_factory=dict)  # the step that each kind of evaluation follows

    @property
    def save(self) -> int:
        """The step that a checkpoint follows: the one of the validation, which saves the best checkpoint anyway."""
        return self.due.get("validation", max(self.due.values(), default=self.steps // 2) + 1)


def run_trial(trial: Trial) -> TrialResults:
    """Train some steps of the run with every kind of evaluation and a save, and return what was measured.

    If the first step takes long, the trial starts again with two micro-batches per step. Ctrl+C and SIGTERM stop it.
    It leaves no process and no file.

    Raises:
        UserError: the run rejects its settings, or there is not enough memory.
        TrialError: the trial failed for another reason.
    """
    settings = trial.settings
    planned = plan_trial(settings, trial.limits.steps, trial.batch.accumulation)
    shortened = plan_trial(settings, LEAST_STEPS, _SLOW_ACCUMULATION)
    with _sigterm_interrupts(), trial_directory(settings.checkpoint.dir) as directory:
        finished = _train(trial, planned, directory) or _train(trial, shortened, directory)
        assert finished is not None  # the shortened trial is always finished
        return read_results(finished)


def plan_trial(settings: Settings, steps: int, accumulation: int) -> TrialSchedule:
    """Plan each evaluation of the run once, in the second half of the trial, each at its own step, and then a save.

    The trial gets more than ``steps`` steps if the evaluations require it. If its time ends before, the evaluations
    that it does not reach have no measurement, and the plan shows them as "not measured".
    """
    missing = {f"evaluations.{name}" for name, each in settings.evaluations.items() if not each.path.exists()}
    if not settings.hellaswag.path.exists():
        missing.add("hellaswag")  # a trial does not download files
    names = [name for name, every in evaluation_intervals(settings).items() if every and name not in missing]
    steps = max(steps, 2 * (len(names) + 2))  # the second half: one for each, one for the save, and one during it
    return TrialSchedule(steps, accumulation, {name: steps // 2 + 1 + index for index, name in enumerate(names)})


def _train(trial: Trial, schedule: TrialSchedule, directory: Path) -> FinishedTrial | None:
    """Run the ranks; return None, with all files of the run removed, if the first step takes too long."""
    overrides = {**trial.overrides, **_overrides(trial, schedule, directory)}
    arguments = ["--config", str(trial.config.absolute()), *(f"{key}={value}" for key, value in overrides.items())]
    environment = {
        **trial_rank.request(directory),
        **stop_request.supervisor_environment(),
    }  # the ranks end with this process
    start_time = time.time()
    ranks = Ranks(arguments, trial.layout, directory / "outcome", environment, trial_rank.SCRIPT)
    try:
        log_sizes = _watch(ranks, trial, schedule, directory / "runs" / trial.settings.run.name)
    finally:
        while not ranks.have_exited:
            ranks.kill()
            time.sleep(_POLL_SECONDS)
    if log_sizes is None:
        shutil.rmtree(directory / "runs")
        return None
    if ranks.outcome().code not in (exit_codes.DONE, exit_codes.STOPPED):
        _raise(ranks, directory, out_of_memory=ranks.ran_out_of_memory)
    return FinishedTrial(
        settings=run_location.load(trial.config, overrides),
        directory=directory,
        ranks=trial.layout.ranks,
        run_accumulation=trial.batch.accumulation,
        accumulation=schedule.accumulation,
        due=schedule.due,
        start_time=start_time,
        log_sizes=log_sizes,
    )


def _watch(ranks: Ranks, trial: Trial, schedule: TrialSchedule, run_dir: Path) -> dict[int, int] | None:
    """Report the progress until all ranks have ended; stop them after the last step or when the time is over.

    Returns:
        The size of train.log at the beginning of each step that was observed; None, immediately, if the first step
        takes too long and can be shortened.
    """
    log_sizes: dict[int, int] = {}
    first_step_start: float | None = None
    reported = ""
    can_be_shortened = schedule.accumulation == trial.batch.accumulation > _SLOW_ACCUMULATION
    while not ranks.have_exited:
        time.sleep(_POLL_SECONDS)
        beat = read_beat(run_dir, 0)
        step = beat.step if beat is not None else 0
        text = f"trial: step {step} of {schedule.steps}, {beat.phase}" if step and beat else "trial: starting"
        if text != reported:
            trial.report(text)
            reported = text
        if not step:
            continue
        log_sizes.setdefault(step, _size(run_dir / LOG))
        first_step_start = first_step_start or time.monotonic()
        passed = time.monotonic() - first_step_start
        if step == 1 and passed > trial.limits.seconds / _SLOW_FRACTION and can_be_shortened:
            return None
        if step > schedule.steps or (passed > trial.limits.seconds and step > _LEAST_STEPS_IN_TIME):
            (run_dir / stop_request.STOP_FILE).touch()
    return log_sizes


def _size(file: Path) -> int:
    """Return the size of ``file`` in bytes; 0 if it does not exist."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _overrides(trial: Trial, schedule: TrialSchedule, directory: Path) -> dict[str, str]:
    """Return the settings of the trial that differ from the run's. The schedule remains: the trial is stopped early."""
    checkpoint, batch = trial.settings.checkpoint, trial.batch
    # A trial ends before the first epoch: the best checkpoint shows the cost of a checkpoint of weights alone.
    weights_only = "weights" in (checkpoint.epochs_as, checkpoint.best_as) and checkpoint.keep_best
    return {
        "run.dir": str(directory / "runs"),
        "checkpoint.dir": str(directory / "checkpoints"),
        "monitor.dir": "null",
        "checkpoint.backup.to": "null",
        "checkpoint.keep_last": "1",
        "checkpoint.keep_every": "0",
        "checkpoint.every": str(schedule.save),
        "checkpoint.best_as": "weights" if weights_only else "full",
        "batch.tokens_per_step": str(batch.tokens_per_step // batch.accumulation * schedule.accumulation),
        **{f"{name}.every": str(schedule.due.get(name, 0)) for name in evaluation_intervals(trial.settings)},
    }


def _raise(ranks: Ranks, directory: Path, out_of_memory: bool) -> NoReturn:
    """Raise an error with the reason why the ranks failed."""
    failures = ranks.failures()
    if out_of_memory or any("OutOfMemoryError" in text for text in failures.values()):
        raise UserError("out of memory in a training step: reduce batch.micro_batch")
    errors = [line for line in _output(directory, 0) if line.startswith("error: ")]
    if ranks.outcome().code == exit_codes.MISTAKE and errors:
        raise UserError(errors[-1].removeprefix("error: "))
    first = next((f"rank {rank}: {text}" for rank, text in failures.items()), ranks.exit_status)
    raise TrialError(f"the trial failed: {first}")


def _output(directory: Path, rank: int) -> list[str]:
    """Return the lines that a rank has printed."""
    with contextlib.suppress(OSError):
        return trial_rank.output_file(directory, rank).read_text(encoding="utf-8", errors="replace").splitlines()
    return []


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt like Ctrl+C, so that processes and files are removed."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
