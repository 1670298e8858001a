"""The report as one HTML file: everything is in it, and the browser is forbidden to fetch anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from plotly.offline import get_plotlyjs

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.common.formatting import MISSING, clock, done_share, duration, fixed, percent, size, tokens, zone
from ds_gpt2.monitoring.pace import RECENT_LABEL, Range
from ds_gpt2.run_dir.journal import ROUTINE
from ds_gpt2.tools.report.charts import Chart
from ds_gpt2.tools.report.run import Run
from ds_gpt2.tools.report.style import SCRIPT, STYLE
from ds_gpt2.tools.report.summary import Since, Summary

_SAMPLES = 5  # of each prompt that are shown
_INCIDENTS = 50  # newest that are shown
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class RunSection:
    """What the page shows of one run; ``run`` is cut to the window that is looked at."""

    run: Run
    summary: Summary


def render(parts: Sequence[RunSection], charts: Sequence[Chart], now: float) -> str:
    """The whole page.

    Args:
        charts: of all runs together.
        now: seconds since 1970.
    """
    names = ", ".join(part.run.name for part in parts)
    body = [
        f"<h1>{'Run' if len(parts) == 1 else 'Runs'} {escape(names)}</h1>",
        f'<p class="faint">as of {clock(now)}, {zone(now)}</p>',
    ]
    for part in parts:
        body.append(_verdict(part.summary, named=len(parts) > 1))
    summaries = [part.summary for part in parts]
    body += [_since(summaries), _figures(summaries), "<h2>Curves</h2>", *map(_chart, range(len(charts)), charts)]
    for part in parts:
        told = _told(part)
        body.append(told if len(parts) == 1 else _details(f"<h2>{escape(part.run.name)}</h2>", told))
    return _document(names, "\n".join(body), charts)


def sentence(summary: Summary) -> str:
    """The run in one line, for a person in a hurry."""
    if summary.state == "no data yet":
        return "No data yet: nothing is recorded."
    share = f" of {summary.steps:,} ({done_share(summary.step, summary.steps)})" if summary.steps else ""
    ago = f"last record {duration(summary.last_record_age_seconds or 0)} ago"
    words = [f"{_STATES[summary.state]}: step {summary.step:,}{share}, {ago}"]
    if summary.ending and summary.state != "finished":
        words[0] += f" ({summary.ending})"
    losses = [f"loss {_loss(summary.loss)} ({RECENT_LABEL})"]
    if summary.best_val_loss is not None:
        best = f"best {_loss(summary.best_val_loss)} at step {summary.best_val_step:,}"
        losses.append(f"validation {_loss(summary.val_loss)} ({best})")
    losses = [*_not_finite(summary), *losses]
    words.append(losses[0][0].upper() + ", ".join(losses)[1:])
    if summary.tokens_per_s is not None:
        words.append(f"{summary.tokens_per_s:,.0f} tokens/s, goodput {percent(summary.goodput)}")
    if summary.finish is not None and summary.seconds_left is not None:
        words.append(f"Done in {duration(summary.seconds_left.mean)}, about {clock(summary.finish)}")
    elif summary.seconds_left is not None:
        words.append(f"{duration(summary.seconds_left.mean)} of training left")
    return ". ".join(words) + "."


def _not_finite(summary: Summary) -> list[str]:
    """A warning if the newest losses are not finite: the figures after it are older."""
    found = (("training", summary.loss_not_finite_step), ("validation", summary.val_loss_not_finite_step))
    return [f"the newest {which} loss is NaN or infinite (step {step:,})" for which, step in found if step is not None]


_STATES = {
    "running": "Running",
    "finished": "Finished",
    "stopped": "Stopped",
    "silent": "Silent, so it hangs, has died, or its files were copied",
}


def _verdict(summary: Summary, named: bool) -> str:
    name = f"<b>{escape(summary.run)}</b> " if named else ""
    return f'<p class="verdict {summary.state.split()[0]}">{name}{escape(sentence(summary))}</p>'


def _since(summaries: Sequence[Summary]) -> str:
    """What happened in the window, one column a run; nothing where no window was asked for."""
    windows = [summary.since for summary in summaries if summary.since is not None]
    if not windows:
        return ""
    rows = [
        ("steps done", [f"{window.steps:,}" for window in windows]),
        (f"loss ({RECENT_LABEL})", [_change(window) for window in windows]),
        ("starts", [str(window.starts) for window in windows]),
        ("best validation loss", [_at(window.best_val_loss, window.best_val_step) for window in windows]),
        ("worst gradient norm", [_at(window.worst_grad_norm, window.worst_grad_norm_step) for window in windows]),
    ]
    title = f"<h2>The last {duration(windows[0].seconds)}</h2>"
    return title + _by_run(summaries, rows) + '<p class="faint">Curves and tables below show these hours only.</p>'


def _change(window: Since) -> str:
    if window.loss_now is None:
        return "no step was recorded"
    if window.loss_before is None:
        return _loss(window.loss_now)
    change = window.loss_now - window.loss_before
    return f"{_loss(window.loss_before)} → {_loss(window.loss_now)} ({change:+.4f})"


def _figures(summaries: Sequence[Summary]) -> str:
    """One column a run."""
    columns = [_figures_of(summary) for summary in summaries]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return "<h2>Figures</h2>" + _by_run(summaries, [row for row in rows if set(row[1]) != {MISSING}])


def _figures_of(summary: Summary) -> dict[str, str]:
    """Label to text, the same labels for every run."""
    return {
        "step": f"{summary.step:,}" + (f" of {summary.steps:,}" if summary.steps else ""),
        "tokens": MISSING if summary.tokens is None else tokens(summary.tokens),
        "epochs": fixed(summary.epoch, 2),
        f"loss ({RECENT_LABEL})": _loss(summary.loss),
        "newest validation loss": _loss(summary.val_loss),
        "best validation loss": _at(summary.best_val_loss, summary.best_val_step),
        "HellaSwag (newest acc_norm)": percent(summary.hellaswag_acc_norm, 2),
        f"gradient norm ({RECENT_LABEL})": fixed(summary.grad_norm),
        "updates clipped": percent(summary.clipped_share),
        "updates skipped": _if_any(summary.skipped_steps),
        "losses that were no number": _if_any(summary.not_finite_losses),
        f"tokens/s ({RECENT_LABEL})": fixed(summary.tokens_per_s, 0),
        f"seconds a step ({RECENT_LABEL})": fixed(summary.step_seconds),
        f"MFU ({RECENT_LABEL})": percent(summary.mfu),
        "goodput (share of the time that went into steps)": percent(summary.goodput),
        "restarts by the supervisor": str(summary.restarts),
        "resumes by hand": str(summary.resumes),
        "time lost": MISSING if summary.lost_seconds is None else duration(summary.lost_seconds),
        "damaged lines left out": _if_any(summary.damaged_lines),
        "times that are estimated": _if_any(summary.estimated_times),
    }


def _if_any(count: float | None) -> str:
    return f"{count:,.0f}" if count else MISSING


def _at(value: float | None, step: int | None) -> str:
    return MISSING if value is None else f"{fixed(value, 4)} at step {step:,}"


def _loss(value: float | None) -> str:
    """As ``status`` shows it."""
    return fixed(value, 4)


def _by_run(summaries: Sequence[Summary], rows: Sequence[tuple[str, list[str]]]) -> str:
    names = ["", *(summary.run for summary in summaries)] if len(summaries) > 1 else []
    return f'<div class="figures">{_table(names, [[label, *texts] for label, texts in rows])}</div>'


def _chart(number: int, chart: Chart) -> str:
    title = f"<h3>{escape(chart.title)}</h3>"
    if not chart.traces:
        return title + '<p class="faint">no data yet</p>'
    note = f'<p class="faint">{escape(chart.note)}</p>' if chart.note else ""
    return f'{title}<div class="chart" id="chart-{number}"></div>{note}'


def _told(part: RunSection) -> str:
    """What is told of one run alone."""
    run = part.run
    notes = f"<pre>{escape(run.notes)}</pre>" if run.notes else ""
    sections = [
        ("What it writes", _samples(run) if run.settings.samples.every or run.records.samples else ""),
        ("Starts", _starts(run)),
        ("Incidents", _incidents(run)),
        ("Checkpoints kept", _checkpoints(run.checkpoints)),
        ("Notes", notes),
        ("What is left to do", _left(part.summary)),
        ("Settings", _details("all of them", f"<pre>{escape(run.settings_text)}</pre>")),
    ]
    return "\n".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)


_NOTHING = '<p class="faint">no data yet</p>'


def _samples(run: Run) -> str:
    """Of each prompt the newest text, open, and some older ones, closed, evenly spread over the steps."""
    told = []
    for tag, texts in sorted(run.records.samples.items()):
        told.append(f"<h3>{escape(_prompt(run, tag))}</h3>")
        for number, step in enumerate(_spread(sorted(texts, reverse=True), _SAMPLES)):
            told.append(_details(f"step {step:,}", f"<pre>{escape(texts[step])}</pre>", is_open=number == 0))
    return "".join(told) or _NOTHING


def _prompt(run: Run, tag: str) -> str:
    """The prompt of ``samples/<n>`` as the settings have it now; the tag itself where they have no such."""
    number = tag.removeprefix("samples/")
    prompts = run.settings.samples.prompts
    return prompts[int(number)] if number.isdecimal() and int(number) < len(prompts) else tag


def _spread(steps: list[int], count: int) -> list[int]:
    """At most ``count`` of ``steps``: the first, the last, and some between."""
    if len(steps) <= count:
        return steps
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]


def _starts(run: Run) -> str:
    rows = []
    for start in reversed(run.starts):
        lost = start.lost_seconds
        rows.append(
            [
                MISSING if start.time is None else clock(start.time),
                f"{start.from_step:,}",
                MISSING if start.world_size is None else str(start.world_size),
                "the supervisor" if start.restart else "hand",
                MISSING if lost is None else duration(lost),
                (start.commit or MISSING)[:9],
            ]
        )
    return _table(["when", "from step", "ranks", "started by", "time lost", "commit"], rows) if rows else _NOTHING


def _incidents(run: Run) -> str:
    """Nothing at all where there is none: a quiet run has no such section."""
    incidents = [event for event in run.events if event.kind not in ROUTINE]
    newest = incidents[: -_INCIDENTS - 1 : -1]
    rows = [
        [clock(event.time), MISSING if event.step is None else f"{event.step:,}", event.kind, event.text]
        for event in newest
    ]
    older = len(incidents) - len(newest)
    more = f'<p class="faint">and {older:,} older ones</p>' if older else ""
    return _table(["when", "step", "what", ""], rows) + more if rows else ""


def _checkpoints(found: Iterable[Generation]) -> str:
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
    return _table(["tag", "step", "val loss", "size", "made", "kind"], rows) if rows else _NOTHING


def _left(summary: Summary) -> str:
    """How long it will go on, and what that costs where power or prices are known."""
    if summary.state == "finished":
        return "<p>Nothing: it is finished.</p>"
    left, pace = summary.seconds_left, summary.seconds_per_step
    if left is None or pace is None or summary.steps is None:
        return _NOTHING
    rows = [
        ["steps", f"{summary.steps - summary.step:,}"],
        ["seconds a step, evaluation and saves included", _range(pace, 3)],
        ["hours", _range(left.times(1 / 3600), 1)],
    ]
    if summary.finish is not None:
        early, late = (summary.finish + seconds - left.mean for seconds in (left.low, left.high))
        rows.append(["done", f"{clock(summary.finish)} ({clock(early)} to {clock(late)})"])
    rows += _costs(summary)
    note = "In brackets: by the 10th and the 90th percentile of the newest windows of steps. Interruptions come on top."
    return _table([], rows) + f'<p class="faint">{note}</p>'


def _costs(summary: Summary) -> list[list[str]]:
    cost = summary.cost
    if cost is None:
        return []
    rows = []
    if cost.watts is not None and cost.energy_kwh is not None:
        source = " (recorded by the GPUs, without the rest of the machine)" if cost.watts_recorded else " (as given)"
        rows += [["power", f"{cost.watts:,.0f} W{source}"], ["energy", _range(cost.energy_kwh, 1) + " kWh"]]
    if cost.energy_money is not None:
        rows.append(["price of the energy", _range(cost.energy_money, 2)])
    if cost.hours_money is not None:
        rows.append(["price of the hours", _range(cost.hours_money, 2)])
    return rows


def _range(value: Range, digits: int) -> str:
    return f"{value.mean:,.{digits}f} ({value.low:,.{digits}f} to {value.high:,.{digits}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are texts, not HTML; the first of each row is its label where there is no head."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    lines = [f"<th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) for row in rows]
    return f'<div class="wide"><table>{top}{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _details(summary: str, content: str, is_open: bool = False) -> str:
    """Both are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{content}</details>"


def _document(title: str, body: str, charts: Sequence[Chart]) -> str:
    drawn = [
        {"id": f"chart-{number}", "traces": chart.traces, "layout": chart.layout}
        for number, chart in enumerate(charts)
        if chart.traces
    ]
    figures = json.dumps(drawn, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="charts">{figures}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
