"""Figures of a run: progress, speed, time left, costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_gpt2.monitoring.pace import WINDOW, Cadence, Pace, Range, recent_step_seconds, timed_of
from ds_gpt2.run_dir.fork_record import Fork
from ds_gpt2.tools.report.curves import Curves
from ds_gpt2.tools.report.run import Run
from ds_gpt2.tools.resources.history import history_of
from ds_gpt2.tools.resources.prices import Cost, Prices, cost_of
from ds_gpt2.tools.resources.run_hosts import RunHost, hosts_of
from ds_gpt2.tools.resources.run_state import RunState, State, finished_by_checkpoint, read_run_state

_TIMES = ("perf/step_ms", "perf/eval_ms", "perf/save_ms")


@dataclass(frozen=True)
class Since:
    """Figures of a time window that ends now."""

    seconds: float
    steps: int
    loss_before: float | None
    loss_now: float | None
    starts: int
    best_val_loss: float | None
    best_val_step: int | None
    worst_grad_norm: float | None
    worst_grad_norm_step: int | None


@dataclass(frozen=True)
class Summary:
    """Figures of one run, as ``report --json`` prints them; None where the files do not contain a value."""

    run: str
    state: State  # as ``status`` shows it
    ending: str | None  # reason of the state
    step: int
    steps: int | None
    last_record: float | None  # seconds since 1970
    last_record_age_seconds: float | None
    tokens: int | None
    epoch: float | None
    loss: float | None  # median of the last 50 steps
    not_finite_losses: int
    loss_not_finite_step: int | None  # step of the newest training loss, if that is NaN or infinite
    val_loss_not_finite_step: int | None  # step of the newest validation loss, if that is NaN or infinite
    val_loss: float | None
    best_val_loss: float | None
    best_val_step: int | None
    hellaswag_acc_norm: float | None
    grad_norm: float | None  # median of the last 50 steps
    clipped_share: float | None
    skipped_steps: int | None
    tokens_per_s: float | None  # median of the last 50 steps
    step_seconds: float | None  # the same
    mfu: float | None  # the same
    goodput: float | None  # perf/goodput as last recorded
    seconds_per_step: Range | None  # wall time, evaluation and saving included, mean of the last 2,000 steps
    seconds_left: Range | None  # see ds_gpt2.monitoring.pace
    finish: float | None  # seconds since 1970; None if it does not run
    restarts: int  # by the supervisor
    resumes: int  # by the user
    lost_seconds: float | None
    kept_share: float | None  # share of the time that is not lost
    damaged_lines: int
    estimated_times: int
    since: Since | None
    cost: Cost | None
    hosts: list[RunHost]  # of a run on several machines; else empty
    forked_from: Fork | None  # the run's parent; None if it is not a fork


def summarize(run: Run, now: float, prices: Prices | None = None, since_seconds: float | None = None) -> Summary:
    """Return the figures of ``run``.

    Args:
        now: seconds since 1970.
        since_seconds: length of the time window of ``Summary.since``; None: no window.
    """
    records, steps = run.records, run.steps
    curve = records.curve
    pace = pace_of(run)
    state = _state(run, now, pace)
    step = run.last_step(state.beat)
    left = pace.left(step, steps) if steps and state.state != "finished" else None
    newest = float(records.times[-1]) if len(records.times) else None
    best_step, best = curve("val/loss").lowest() or (None, None)
    starts = _starts(run, state.state, now)
    return Summary(
        run=run.name,
        state=state.state,
        ending=state.why,
        step=step,
        steps=steps,
        last_record=newest,
        last_record_age_seconds=None if newest is None else max(0.0, now - newest),
        tokens=_whole(curve("train/tokens").last()),
        epoch=curve("train/epoch").last(),
        loss=curve("train/loss").recent(),
        not_finite_losses=len(curve("train/loss")) - len(curve("train/loss").finite()),
        loss_not_finite_step=curve("train/loss").not_finite_at_end(),
        val_loss_not_finite_step=curve("val/loss").not_finite_at_end(),
        val_loss=curve("val/loss").last(),
        best_val_loss=best,
        best_val_step=best_step,
        hellaswag_acc_norm=curve("hellaswag/acc_norm").last(),
        grad_norm=curve("train/grad_norm").recent(),
        clipped_share=curve("train/clipped_share").last(),
        skipped_steps=_whole(curve("train/skipped_steps").last()),
        tokens_per_s=curve("perf/tokens_per_s").recent(),
        step_seconds=recent_step_seconds(curve("perf/step_ms").values.tolist()),
        mfu=curve("perf/mfu").recent(),
        goodput=curve("perf/goodput").last(),
        seconds_per_step=pace.wall_seconds,
        seconds_left=left,
        finish=state.finish_time(now, left.mean if left is not None else None),
        restarts=starts.restarts,
        resumes=starts.resumes,
        lost_seconds=starts.lost_seconds,
        kept_share=starts.kept_share,
        damaged_lines=records.damaged,
        estimated_times=records.estimated,
        since=None if since_seconds is None else since(run, now, since_seconds),
        cost=None if left is None else cost_of(left, _power(records), prices or Prices()),
        hosts=hosts_of(run.events),
        forked_from=run.fork,
    )


def _whole(value: float | None) -> int | None:
    """Return a recorded count as an integer."""
    return None if value is None else int(value)


def pace_of(run: Run) -> Pace:
    """Return the pace of a run from all its records."""
    records = run.records
    pace = Pace(Cadence.of(run.settings), [start.from_step for start in run.starts])
    for timed in timed_of(_times_of(records)):
        pace.add(timed)
    return pace


def _times_of(records: Curves) -> Iterator[dict[str, Any]]:
    """Yield for each step a record as ``timed_of`` reads it."""
    columns = [_at_all_steps(records, tag) for tag in _TIMES]
    for step, when, *values in zip(records.steps.tolist(), records.times.tolist(), *columns, strict=True):
        yield {"step": step, "time": when, **dict(zip(_TIMES, values, strict=True))}


def _at_all_steps(records: Curves, tag: str) -> list[float]:
    """Return one value per step, (steps,), NaN where the tag was not recorded."""
    values = np.full(len(records.steps), np.nan)
    curve = records.curve(tag)
    values[np.searchsorted(records.steps, curve.steps)] = curve.values
    found: list[float] = values.tolist()
    return found


@dataclass(frozen=True)
class _Starts:
    restarts: int
    resumes: int
    lost_seconds: float | None
    kept_share: float | None


def _starts(run: Run, state: State, now: float) -> _Starts:
    """Return the figures of ``status``; for a run without a journal, those of its starts."""
    if any(event.kind == "start" for event in run.events):
        history = history_of(run.events, state, now)
        return _Starts(history.restarts, history.resumes, history.lost_seconds, history.kept_share)
    lost = [start.lost_seconds for start in run.starts if start.lost_seconds is not None]
    return _Starts(0, max(0, len(run.starts) - 1), sum(lost) if lost else None, None)


def since(run: Run, now: float, seconds: float) -> Since:
    """Return the figures of the last ``seconds``."""
    window = run.records.since(now - seconds)
    loss = run.records.curve("train/loss")
    before = loss.until(int(window.steps[0]) - 1).recent() if len(window.steps) else None
    best_step, best = window.curve("val/loss").lowest() or (None, None)
    worst_step, worst = window.curve("train/grad_norm").highest() or (None, None)
    return Since(
        seconds=seconds,
        steps=len(window.steps),
        loss_before=before,
        loss_now=loss.recent() if len(window.steps) else None,
        starts=sum(start.time is not None and start.time >= now - seconds for start in run.starts),
        best_val_loss=best,
        best_val_step=best_step,
        worst_grad_norm=worst,
        worst_grad_norm_step=worst_step,
    )


def _state(run: Run, now: float, pace: Pace) -> RunState:
    """Return the state that ``status`` shows."""
    state = read_run_state(run.directory, run.settings, run.events, pace.mean_step_seconds(), now)
    newest = next((one for one in run.checkpoints if one.is_resumable), None)
    return finished_by_checkpoint(state, newest, run.steps)


def _power(records: Curves) -> float | None:
    """Return the mean power of all GPUs over the newest steps, in watts; None if none is recorded."""
    first = records.newest - WINDOW + 1
    watts = records.curve("perf/gpu_power_w").since(first).finite().values
    return float(watts.mean()) if len(watts) else None
