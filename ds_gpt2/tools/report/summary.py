"""A run in figures: where it is, how fast it goes, what it has left to do, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ds_gpt2.monitoring.pace import WINDOW, Cadence, Pace, Range, timed_of
from ds_gpt2.tools.report.curves import Curves
from ds_gpt2.tools.report.run import Run
from ds_gpt2.tools.resources.history import history_of
from ds_gpt2.tools.resources.prices import Prices
from ds_gpt2.tools.resources.run_state import State as LifeState

_SILENT = 600.0  # seconds without a record, or ten steps if they take longer, after which a run no longer looks alive

_TIMES = ("perf/step_ms", "perf/eval_ms", "perf/save_ms")

State = Literal["no data yet", "running", "stopped", "silent", "finished"]


@dataclass(frozen=True)
class Cost:
    """What the steps that are left will take. Money is in whatever the prices are in."""

    watts: float | None
    watts_recorded: bool  # by the GPUs themselves, without the rest of the machine
    energy_kwh: Range | None
    energy_money: Range | None
    hours_money: Range | None


@dataclass(frozen=True)
class Since:
    """What happened in a window that ends now."""

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
    """The figures of one run, as ``report --json`` prints them; None where the files do not tell."""

    run: str
    state: State
    ending: str | None
    step: int
    steps: int | None
    last_record: float | None  # seconds since 1970
    last_record_age_seconds: float | None
    tokens: float | None
    epoch: float | None
    loss: float | None  # median of the last 50 steps
    not_finite_losses: int
    loss_not_finite_step: int | None  # the newest step, if its loss is NaN or infinite
    val_loss_not_finite_step: int | None  # of the newest validation, if its loss is NaN or infinite
    val_loss: float | None
    best_val_loss: float | None
    best_val_step: int | None
    hellaswag_acc_norm: float | None
    grad_norm: float | None  # median of the last 50 steps
    clipped_share: float | None
    skipped_steps: float | None
    tokens_per_s: float | None  # median of the last 50 steps
    step_seconds: float | None  # the same
    mfu: float | None  # the same
    goodput: float | None  # perf/goodput as last recorded
    seconds_per_step: Range | None  # wall time, evaluation and saving included, mean of the last 2,000 steps
    seconds_left: Range | None  # see ds_gpt2.monitoring.pace
    finish: float | None  # seconds since 1970; None where it does not run
    restarts: int  # by the supervisor
    resumes: int  # by hand
    lost_seconds: float | None
    kept_share: float | None  # of the time, what is not lost
    damaged_lines: int
    estimated_times: int
    since: Since | None
    cost: Cost | None


def summarize(run: Run, now: float, prices: Prices | None = None, since_seconds: float | None = None) -> Summary:
    """The figures of ``run``.

    Args:
        now: seconds since 1970.
        since_seconds: the length of the window to look at more closely.
    """
    records = run.records
    curve = records.curve
    pace = pace_of(run)
    state = _state(run, now, pace.wall_seconds)
    steps = run.steps
    left = pace.left(records.newest, steps) if steps and state != "finished" else None
    newest = float(records.times[-1]) if len(records.times) else None
    best_step, best = curve("val/loss").lowest() or (None, None)
    step_ms = curve("perf/step_ms").recent()
    past = _past(run, state, now)
    return Summary(
        run=run.name,
        state=state,
        ending=run.ending,
        step=records.newest,
        steps=steps,
        last_record=newest,
        last_record_age_seconds=None if newest is None else max(0.0, now - newest),
        tokens=curve("train/tokens").last(),
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
        skipped_steps=curve("train/skipped_steps").last(),
        tokens_per_s=curve("perf/tokens_per_s").recent(),
        step_seconds=None if step_ms is None else step_ms / 1000,
        mfu=curve("perf/mfu").recent(),
        goodput=curve("perf/goodput").last(),
        seconds_per_step=pace.wall_seconds,
        seconds_left=left,
        finish=now + left.mean if left and state == "running" else None,
        restarts=past.restarts,
        resumes=past.resumes,
        lost_seconds=past.lost_seconds,
        kept_share=past.kept_share,
        damaged_lines=records.damaged,
        estimated_times=records.estimated,
        since=None if since_seconds is None else since(run, now, since_seconds),
        cost=_cost(left, _power(records), prices or Prices()),
    )


def pace_of(run: Run) -> Pace:
    """The pace of a run by all its records."""
    records = run.records
    pace = Pace(Cadence.of(run.settings), [start.from_step for start in run.starts])
    for timed in timed_of(_times_of(records)):
        pace.add(timed)
    return pace


def _times_of(records: Curves) -> Iterator[dict[str, Any]]:
    """What ``timed_of`` reads, step by step."""
    columns = [_at_all_steps(records, tag) for tag in _TIMES]
    for step, when, *values in zip(records.steps.tolist(), records.times.tolist(), *columns, strict=True):
        yield {"step": step, "time": when, **dict(zip(_TIMES, values, strict=True))}


def _at_all_steps(records: Curves, tag: str) -> list[float]:
    """A curve as one value a step, NaN where it was not recorded."""
    values = np.full(len(records.steps), np.nan)
    curve = records.curve(tag)
    values[np.searchsorted(records.steps, curve.steps)] = curve.values
    found: list[float] = values.tolist()
    return found


@dataclass(frozen=True)
class _Past:
    restarts: int
    resumes: int
    lost_seconds: float | None
    kept_share: float | None


def _past(run: Run, state: State, now: float) -> _Past:
    """As ``status`` has it; a run of before there was a journal by its starts and records."""
    if any(event.kind == "start" for event in run.events):
        history = history_of(run.events, _LIFE[state], now)
        return _Past(history.restarts, history.resumes, history.lost_seconds, history.kept_share)
    lost = [start.lost_seconds for start in run.starts if start.lost_seconds is not None]
    return _Past(0, max(0, len(run.starts) - 1), sum(lost) if lost else None, None)


_LIFE: dict[State, LifeState] = {
    "no data yet": "starting",
    "running": "running",
    "stopped": "stopped",
    "silent": "dead",
    "finished": "finished",
}


def since(run: Run, now: float, seconds: float) -> Since:
    """What happened in the last ``seconds``."""
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


def _state(run: Run, now: float, pace: Range | None) -> State:
    if not len(run.records.steps):
        return "no data yet"
    if run.steps is not None and run.records.newest >= run.steps:
        return "finished"
    if run.ending is not None:
        return "stopped"
    patience = max(_SILENT, 10 * pace.mean if pace else 0.0)
    return "running" if now - run.records.times[-1] <= patience else "silent"


def _power(records: Curves) -> float | None:
    """Watts of the GPUs, the mean over the newest steps; None where none were recorded among them."""
    first = records.newest - WINDOW + 1
    watts = records.curve("perf/gpu_power_w").since(first).finite().values
    return float(watts.mean()) if len(watts) else None


def _cost(seconds_left: Range | None, recorded_watts: float | None, prices: Prices) -> Cost | None:
    watts = prices.watts if prices.watts is not None else recorded_watts
    if seconds_left is None or (watts is None and prices.per_hour is None):
        return None
    hours = seconds_left.times(1 / 3600)
    energy = None if watts is None else hours.times(watts / 1000)
    return Cost(
        watts=watts,
        watts_recorded=prices.watts is None and watts is not None,
        energy_kwh=energy,
        energy_money=None if energy is None or prices.per_kwh is None else energy.times(prices.per_kwh),
        hours_money=None if prices.per_hour is None else hours.times(prices.per_hour),
    )
