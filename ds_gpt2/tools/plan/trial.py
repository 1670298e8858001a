"""A few steps of the real run, started as it would be, in a directory of their own that nothing is left of."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.process_start import is_running, start_of
from ds_gpt2.config import run_location
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.pace import EVALUATIONS
from ds_gpt2.run_dir import exit_report, stop_request
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.tools.plan import trial_rank
from ds_gpt2.tools.plan.trial_results import Traces, read_traces
from ds_gpt2.tools.resources.machine import existing

LEAST_STEPS = 10  # the first ones do not count, each hook has one of its own, and a save some to be seen beside

_SLOW = 8  # a first step that takes more than this part of the time is shortened
_SLOW_ACCUMULATION = 2  # micro-batches a step: the least that hold the sums of earlier ones in memory
_ENOUGH = 3  # steps after which lack of time ends a trial
_PREFIX = ".plan-"
_LOOK_SECONDS = 0.05
_FOREIGN_SECONDS = 86_400.0  # after which the folder of another machine's plan counts as left behind


class TrialError(Exception):
    """The trial did not come to its end, and not by a mistake of the user's; the message is the reason."""


@dataclass(frozen=True)
class Limits:
    """How much of a trial there is to be."""

    steps: int = 16
    seconds: float = 120.0  # from the first step on


@dataclass(frozen=True)
class Scenes:
    """What is tried."""

    steps: int
    accumulation: int  # micro-batches a step
    due: Mapping[str, int] = field(default_factory=dict)  # the step that is followed by each of EVALUATIONS

    @property
    def save(self) -> int:
        """The step that is followed by a checkpoint; the first validation makes one anyway."""
        return self.due.get("validation", max(self.due.values(), default=self.steps // 2) + 1)


def run_trial(
    config: Path,
    overrides: Mapping[str, str],
    settings: Settings,
    plan: BatchPlan,
    place: RankLayout,
    limits: Limits,
    tell: Callable[[str], None],
) -> Traces:
    """Train some steps of the run with every kind of evaluation and a save, and read what they left.

    Where the first step takes long, the trial begins again with two micro-batches a step. Ctrl+C and SIGTERM end it;
    no process and no file of it is left.

    Args:
        tell: is given one line about how far it is.

    Raises:
        UserError: the run refuses its settings, or it needs more memory than there is.
        TrialError: it ended in another way.
    """
    with _terminable(), _folder(settings.checkpoint.dir) as folder:
        scenes = plan_scenes(settings, limits.steps, plan.accumulation)
        begun = time.time()
        if not _train(folder, config, overrides, scenes, plan, place, limits, tell):
            shutil.rmtree(folder / "runs")
            scenes = plan_scenes(settings, LEAST_STEPS, _SLOW_ACCUMULATION)
            begun = time.time()
            _train(folder, config, overrides, scenes, plan, place, limits, tell)
        tried = run_location.load(config, {**overrides, **_overrides(folder, settings, scenes, plan)})
        return read_traces(tried, folder, place.ranks, plan.accumulation, scenes.accumulation, scenes.due, begun)


def plan_scenes(settings: Settings, steps: int, accumulation: int) -> Scenes:
    """Each evaluation the run will have, in the second half, at a step of its own and only once."""
    wanted = [name for name in EVALUATIONS if getattr(settings, name).every]
    if "hellaswag" in wanted and not settings.hellaswag.path.exists():
        wanted.remove("hellaswag")  # a trial fetches nothing
    return Scenes(steps, accumulation, {name: steps // 2 + 1 + place for place, name in enumerate(wanted)})


def _train(
    folder: Path,
    config: Path,
    overrides: Mapping[str, str],
    scenes: Scenes,
    plan: BatchPlan,
    place: RankLayout,
    limits: Limits,
    tell: Callable[[str], None],
) -> bool:
    """Whether the scenes were played; False if the first step takes too long to wait for the others."""
    settings = run_location.load(config, overrides)
    ours = {**overrides, **_overrides(folder, settings, scenes, plan)}
    arguments = ["--config", str(config.absolute()), *(f"{key}={value}" for key, value in ours.items())]
    ranks = _start(arguments, place, folder)
    try:
        in_time = _watch(ranks, folder / "runs" / settings.run.name, scenes, plan, limits, tell)
    finally:
        while not ranks.have_exited:
            ranks.kill()
            time.sleep(_LOOK_SECONDS)
    if in_time and ranks.outcome().code not in (exit_report.DONE, exit_report.STOPPED):
        _raise(ranks, folder, out_of_memory=ranks.ran_out_of_memory)
    return in_time


def _start(arguments: list[str], place: RankLayout, folder: Path) -> Ranks:
    """The ranks, which end by themselves if this process dies."""
    environment = {**trial_rank.request(folder), **stop_request.supervisor_environment()}
    return Ranks(arguments, place, folder / "outcome", environment, trial_rank.SCRIPT)


def _watch(
    ranks: Ranks, run_dir: Path, scenes: Scenes, plan: BatchPlan, limits: Limits, tell: Callable[[str], None]
) -> bool:
    """Until all have ended; False, at once, where the first step takes too long and could be shorter."""
    begun: float | None = None  # when the first step did
    told = ""
    while not ranks.have_exited:
        time.sleep(_LOOK_SECONDS)
        beat = read_beat(run_dir, 0)
        step = beat.step if beat is not None else 0
        text = f"trial: step {step} of {scenes.steps}, {beat.phase}" if step and beat else "trial: starting"
        if text != told:
            tell(text)
            told = text
        if not step:
            continue
        begun = begun or time.monotonic()
        passed = time.monotonic() - begun
        if step == 1 and passed > limits.seconds / _SLOW and scenes.accumulation == plan.accumulation > 2:
            return False
        if step > scenes.steps or (passed > limits.seconds and step > _ENOUGH):
            (run_dir / stop_request.STOP_FILE).touch()
    return True


def _overrides(folder: Path, settings: Settings, scenes: Scenes, plan: BatchPlan) -> dict[str, str]:
    """What makes of a run its trial. It is stopped at its end, so the schedule stays as it is."""
    checkpoint = settings.checkpoint
    # Ends of epochs are out of reach: what they cost is seen at the best checkpoint.
    reduced = "weights" in (checkpoint.epochs_as, checkpoint.best_as) and checkpoint.keep_best
    return {
        "run.dir": str(folder / "runs"),
        "checkpoint.dir": str(folder / "checkpoints"),
        "monitor.dir": "null",
        "checkpoint.backup.to": "null",
        "checkpoint.keep_last": "1",
        "checkpoint.keep_every": "0",
        "checkpoint.every": str(scenes.save),
        "checkpoint.best_as": "weights" if reduced else "full",
        "batch.tokens_per_step": str(plan.tokens_per_step // plan.accumulation * scenes.accumulation),
        **{f"{name}.every": str(scenes.due.get(name, 0)) for name in EVALUATIONS},
    }


def _raise(ranks: Ranks, folder: Path, out_of_memory: bool) -> NoReturn:
    """Say why the trial ended before its time."""
    failures = ranks.failures()
    if out_of_memory or any("OutOfMemoryError" in text for text in failures.values()):
        raise UserError("out of memory in a training step: reduce batch.micro_batch")
    said = [line for line in _printed(folder, 0) if line.startswith("error: ")]
    if ranks.outcome().code == exit_report.MISTAKE and said:
        raise UserError(said[-1].removeprefix("error: "))
    first = next((f"rank {rank}: {text}" for rank, text in failures.items()), ranks.exit_status)
    raise TrialError(f"the trial failed: {first}")


def _printed(folder: Path, rank: int) -> list[str]:
    with contextlib.suppress(OSError):
        return trial_rank.output_file(folder, rank).read_text(encoding="utf-8", errors="replace").splitlines()
    return []


@contextlib.contextmanager
def _folder(checkpoints: Path) -> Iterator[Path]:
    """An empty directory on the disk of the checkpoints, gone afterwards; so are those that killed plans have left."""
    place = existing(checkpoints)
    for left in place.glob(f"{_PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    owner = f"{os.getpid()}-{start_of(os.getpid())}-{_host()}-"
    try:
        folder = tempfile.mkdtemp(prefix=_PREFIX + owner, dir=place)
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}; set checkpoint.dir, or use --quick") from None
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether the plan that made this folder is gone.

    The directory may be shared with other machines, whose processes cannot be seen: theirs is left alone for a day.
    """
    pid, start, host, _ = [*folder.name.removeprefix(_PREFIX).split("-", 3), "", "", ""][:4]
    if host == _host():
        return not (pid.isdigit() and is_running(int(pid), start))
    with contextlib.suppress(OSError):
        return time.time() - folder.stat().st_mtime > _FOREIGN_SECONDS
    return False


def _host() -> str:
    """This machine's name, fit for a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl+C does: what it has started is ended, what it has written is removed."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
