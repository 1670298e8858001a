"""The report as one self-contained HTML file. Its content security policy forbids every network access.

The template escapes all values except the script of Plotly and the charts as JSON, in which Jinja's ``tojson`` replaces
``<``, ``>``, ``&`` and ``'`` by their Unicode escapes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.formatting import (
    HOUR,
    MISSING,
    clock,
    done_share,
    duration,
    fixed,
    percent,
    signed,
    size,
    tokens,
    zone,
)
from ds_gpt2.monitoring.pace import RECENT_LABEL, Range
from ds_gpt2.run_dir.journal import ROUTINE, Event
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.tools.report.charts import Chart
from ds_gpt2.tools.report.run import Run, Start
from ds_gpt2.tools.report.summary import Since, Summary
from ds_gpt2.tools.resources.losses import not_finite_warnings
from ds_gpt2.tools.resources.prices import Cost
from ds_gpt2.tools.resources.run_hosts import RunHost, names_of
from ds_gpt2.tools.resources.run_state import ACTIVE, State

ASSETS = Path(__file__).parents[2] / "assets"

_SAMPLES = 5  # shown of each prompt
_INCIDENTS = 50  # newest incidents that are shown
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class RunSection:
    """Content of the page for one run; ``run`` is reduced to the requested time window."""

    run: Run
    summary: Summary


@dataclass(frozen=True)
class Table:
    """Cells are plain text; the first cell of each row is its label."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(parts: Sequence[RunSection], charts: Sequence[Chart], now: float) -> str:
    """Return the HTML of the page.

    Args:
        charts: charts that show all runs together.
        now: seconds since 1970.
    """
    summaries = [part.summary for part in parts]
    drawn = [
        {"id": f"chart-{number}", "traces": chart.traces, "layout": chart.layout}
        for number, chart in enumerate(charts)
        if chart.traces
    ]
    return _template().render(
        policy=_POLICY,
        names=", ".join(part.run.name for part in parts),
        as_of=f"{clock(now)}, {zone(now)}",
        window=_window(summaries),
        figures=_figures(summaries),
        charts=charts,
        runs=[_run(part) for part in parts],
        plotly=get_plotlyjs(),
        drawn=drawn,
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("report.html.jinja")


def sentence(summary: Summary) -> str:
    """Return the most important figures of a run in one line."""
    if summary.last_record_age_seconds is None:
        if summary.step > 0:
            return f"{METRICS} is missing or has no readable record: step {summary.step:,} is known from a checkpoint."
        return "No data yet: nothing is recorded."
    share = f" of {summary.steps:,} ({done_share(summary.step, summary.steps)})" if summary.steps else ""
    age = f"last record {duration(summary.last_record_age_seconds)} ago"
    words = [f"{_STATES.get(summary.state, summary.state.capitalize())}: step {summary.step:,}{share}, {age}"]
    if summary.ending and summary.state != "finished":
        words[0] += f" ({summary.ending})"
    losses = [f"loss {_loss(summary.loss)} ({RECENT_LABEL})"]
    if summary.best_val_loss is not None:
        best = f"best {_loss(summary.best_val_loss)} at step {summary.best_val_step:,}"
        losses.append(f"validation {_loss(summary.val_loss)} ({best})")
    losses = [*not_finite_warnings(summary.loss_not_finite_step, summary.val_loss_not_finite_step), *losses]
    words.append(losses[0][0].upper() + ", ".join(losses)[1:])
    if summary.tokens_per_s is not None:
        words.append(f"{summary.tokens_per_s:,.0f} tokens/s, goodput {percent(summary.goodput)}")
    if summary.finish is not None and summary.seconds_left is not None:
        words.append(f"Done in {duration(summary.seconds_left.mean)}, about {clock(summary.finish)}")
    elif summary.seconds_left is not None:
        words.append(f"{duration(summary.seconds_left.mean)} of training left")
    return ". ".join(words) + "."


_STATES: dict[State, str] = {
    "waiting": "Waiting for a restart",
    "hung?": "Hung",
    "mistake": "Stopped by a configuration error",
    "gave up": "Stopped after too many restarts",
    "dead": "Not running (no process found)",
}


def _condition(state: State) -> str:
    """Return the style class of a state."""
    if state in ACTIVE or state == "finished":
        return "good"
    return "paused" if state in ("stopped", "waiting") else "bad"


@dataclass(frozen=True)
class _Window:
    length: str
    table: Table


def _window(summaries: Sequence[Summary]) -> _Window | None:
    """Return the figures of the requested time window, one column per run; None without a window."""
    windows = [summary.since for summary in summaries if summary.since is not None]
    if not windows:
        return None
    rows = [
        ("steps", [f"{window.steps:,}" for window in windows]),
        (f"loss ({RECENT_LABEL})", [_change(window) for window in windows]),
        ("starts", [str(window.starts) for window in windows]),
        ("best validation loss", [_at(window.best_val_loss, window.best_val_step) for window in windows]),
        ("highest gradient norm", [_at(window.worst_grad_norm, window.worst_grad_norm_step) for window in windows]),
    ]
    return _Window(duration(windows[0].seconds), _by_run(summaries, rows))


def _change(window: Since) -> str:
    if window.loss_now is None:
        return "no step was recorded"
    if window.loss_before is None:
        return _loss(window.loss_now)
    change = window.loss_now - window.loss_before
    return f"{_loss(window.loss_before)} → {_loss(window.loss_now)} ({signed(change)})"


def _figures(summaries: Sequence[Summary]) -> Table:
    """Return the figures, one column per run; figures that no run has are left out."""
    columns = [_figures_of(summary) for summary in summaries]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return _by_run(summaries, [row for row in rows if set(row[1]) != {MISSING}])


def _figures_of(summary: Summary) -> dict[str, str]:
    """Return text by label, with the same labels for every run."""
    return {
        "step": f"{summary.step:,}" + (f" of {summary.steps:,}" if summary.steps else ""),
        "forked from": MISSING if summary.forked_from is None else summary.forked_from.lineage,
        "tokens": MISSING if summary.tokens is None else tokens(summary.tokens),
        "epochs": fixed(summary.epoch, 2),
        f"loss ({RECENT_LABEL})": _loss(summary.loss),
        "newest validation loss": _loss(summary.val_loss),
        "best validation loss": _at(summary.best_val_loss, summary.best_val_step),
        "HellaSwag (newest acc_norm)": percent(summary.hellaswag_acc_norm, 2),
        f"gradient norm ({RECENT_LABEL})": fixed(summary.grad_norm),
        "updates clipped": percent(summary.clipped_share),
        "updates skipped": _if_any(summary.skipped_steps),
        "losses that are NaN or infinite": _if_any(summary.not_finite_losses),
        f"tokens/s ({RECENT_LABEL})": fixed(summary.tokens_per_s, 0),
        f"seconds per step ({RECENT_LABEL})": fixed(summary.step_seconds),
        f"MFU ({RECENT_LABEL})": percent(summary.mfu),
        "goodput (share of the time spent in steps)": percent(summary.goodput),
        "hosts": _hosts(summary.hosts),
        "restarts by the supervisor": str(summary.restarts),
        "resumes by hand": str(summary.resumes),
        "time lost": MISSING if summary.lost_seconds is None else duration(summary.lost_seconds),
        "damaged lines (skipped)": _if_any(summary.damaged_lines),
        "records with an estimated time": _if_any(summary.estimated_times),
    }


def _hosts(hosts: Sequence[RunHost]) -> str:
    away = [f"{host.name} is away since {clock(host.away_since)}" for host in hosts if host.away_since is not None]
    return "; ".join([names_of(hosts), *away]) if hosts else MISSING


def _if_any(count: float | None) -> str:
    return f"{count:,.0f}" if count else MISSING


def _at(value: float | None, step: int | None) -> str:
    return MISSING if value is None else f"{fixed(value, 4)} at step {step:,}"


def _loss(value: float | None) -> str:
    """Format a loss as ``status`` does."""
    return fixed(value, 4)


def _by_run(summaries: Sequence[Summary], rows: Sequence[tuple[str, list[str]]]) -> Table:
    names = ["", *(summary.run for summary in summaries)] if len(summaries) > 1 else []
    return Table(names, [[label, *texts] for label, texts in rows])


@dataclass(frozen=True)
class _Sample:
    step: str
    text: str


@dataclass(frozen=True)
class _Prompt:
    title: str
    samples: Sequence[_Sample]  # newest first


@dataclass(frozen=True)
class _RunView:
    """Content of the page for one run, as the template shows it."""

    name: str
    condition: str
    sentence: str
    samples: Sequence[_Prompt] | None  # None: the run generates no samples
    starts: Table
    incidents: Table
    older_incidents: str | None
    checkpoints: Table
    notes: str | None
    is_finished: bool
    left: Table
    settings_text: str


def _run(part: RunSection) -> _RunView:
    run, summary = part.run, part.summary
    incidents = [event for event in run.events if event.kind not in ROUTINE]
    older = max(0, len(incidents) - _INCIDENTS)
    return _RunView(
        name=run.name,
        condition=_condition(summary.state),
        sentence=sentence(summary),
        samples=_samples(run) if run.settings.samples.every or run.records.samples else None,
        starts=_starts(run.starts),
        incidents=_incidents(incidents[: -_INCIDENTS - 1 : -1]),
        older_incidents=f"{older:,}" if older else None,
        checkpoints=_checkpoints(run.checkpoints),
        notes=run.notes,
        is_finished=summary.state == "finished",
        left=_left(summary),
        settings_text=run.settings_text,
    )


def _samples(run: Run) -> list[_Prompt]:
    """Return for each prompt the newest sample and some older samples, evenly spread over the steps."""
    return [
        _Prompt(
            _prompt(run, tag),
            [_Sample(f"{step:,}", texts[step]) for step in _spread(sorted(texts, reverse=True), _SAMPLES)],
        )
        for tag, texts in sorted(run.records.samples.items())
    ]


def _prompt(run: Run, tag: str) -> str:
    """Return the prompt of ``samples/<n>`` from the current settings; the tag itself if they have no such prompt."""
    number = tag.removeprefix("samples/")
    prompts = run.settings.samples.prompts
    return prompts[int(number)] if number.isdecimal() and int(number) < len(prompts) else tag


def _spread(steps: list[int], count: int) -> list[int]:
    """Return at most ``count`` of ``steps``: the first, the last, and evenly spaced steps between them."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _starts(starts: Sequence[Start]) -> Table:
    rows = [
        [
            MISSING if start.time is None else clock(start.time),
            f"{start.from_step:,}",
            MISSING if start.world_size is None else str(start.world_size),
            "the supervisor" if start.restart else "hand",
            MISSING if start.lost_seconds is None else duration(start.lost_seconds),
            (start.commit or MISSING)[:9],
        ]
        for start in reversed(starts)
    ]
    return Table(["time", "from step", "ranks", "started by", "time lost", "commit"], rows)


def _incidents(events: Sequence[Event]) -> Table:
    rows = [
        [clock(event.time), MISSING if event.step is None else f"{event.step:,}", event.kind, event.text]
        for event in events
    ]
    return Table(["time", "step", "kind", ""], rows)


def _checkpoints(found: Sequence[Generation]) -> Table:
    rows = []
    for generation in found:
        known = generation.manifest
        rows.append(
            [
                generation.tag,
                f"{generation.step:,}" if generation.step >= 0 else MISSING,
                fixed(known.val_loss, 4) if known else MISSING,
                size(known.bytes) if known else MISSING,
                clock(known.made_at) if known else MISSING,
                "damaged" if known is None else known.kind,
            ]
        )
    return Table(["tag", "step", "val loss", "size", "made", "kind"], rows)


def _left(summary: Summary) -> Table:
    """Return the time left, and its costs if power or prices are known; no rows if the time is not known."""
    left, pace = summary.seconds_left, summary.seconds_per_step
    if left is None or pace is None or summary.steps is None:
        return Table([], [])
    rows = [
        ["steps", f"{summary.steps - summary.step:,}"],
        ["seconds per step, evaluation and saves included", _range(pace, 3)],
        ["hours", _range(left.times(1 / HOUR), 1)],
    ]
    if summary.finish is not None:
        early, late = (summary.finish + seconds - left.mean for seconds in (left.low, left.high))
        rows.append(["done", f"{clock(summary.finish)} ({clock(early)} to {clock(late)})"])
    return Table([], [*rows, *(_costs(summary.cost) if summary.cost is not None else [])])


def _costs(cost: Cost) -> list[list[str]]:
    rows = []
    if cost.watts is not None and cost.energy_kwh is not None:
        source = "recorded by the GPUs, without the rest of the machine" if cost.watts_recorded else "set by --watts"
        rows += [["power", f"{cost.watts:,.0f} W ({source})"], ["energy", _range(cost.energy_kwh, 1) + " kWh"]]
    if cost.energy_money is not None:
        rows.append(["price of the energy", _range(cost.energy_money, 2)])
    if cost.hours_money is not None:
        rows.append(["price of the hours", _range(cost.hours_money, 2)])
    return rows


def _range(value: Range, digits: int) -> str:
    return f"{value.mean:,.{digits}f} ({value.low:,.{digits}f} to {value.high:,.{digits}f})"
