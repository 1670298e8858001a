"""Charts of one or several runs as Plotly figures: plain dictionaries, which the page draws."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.reference_curves import (
    REFERENCE,
    REFERENCE_CURVE,
    REFERENCE_HELLASWAG,
    REFERENCE_TOKENS_PER_STEP,
    is_comparable_to_reference,
)
from ds_gpt2.tools.report.curves import ACCURACY, SOURCE_LOSS, Curve, Curves, mean_per_step, smoothed, thinned

Trace = dict[str, Any]

_COLORS = ("#3987e5", "#e07b39", "#2f9e6e", "#b06bd6", "#c9a227", "#d9486e")  # visible on white and on black
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_GRAY = "#8a8f98"
_FEW = 60  # curves of at most this many points are drawn with markers
_DESCENT = 0.05  # first share of a run, in which the loss is far above all later values


@dataclass(frozen=True)
class View:
    """A run as it is drawn: its name, and its records in the time window."""

    name: str
    settings: Settings
    records: Curves
    color: str = _COLORS[0]

    def curve(self, tag: str) -> Curve:
        return self.records.curve(tag)


@dataclass(frozen=True)
class Chart:
    """One chart; without data, ``traces`` is empty."""

    title: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def views_of(runs: list[tuple[str, Settings, Curves]]) -> list[View]:
    """Return one view per run, each in its own color."""
    return [View(*run, color=_COLORS[number % len(_COLORS)]) for number, run in enumerate(runs)]


def charts_of(views: list[View], reference: bool = False) -> list[Chart]:
    """Return all charts of the report; each shows all runs, apart from the times by phase.

    Args:
        reference: draw the loss of the reference run even if no run is comparable to it.
    """
    charts = [
        _loss(views, reference),
        _gradients(views),
        _simple("learning rate", views, "train/lr", {"yaxis": {"exponentformat": "e"}}),
        *([_hellaswag(views)] if _has_hellaswag(views) else []),
        *_by_name("validation loss of each source", views, SOURCE_LOSS),
        *_by_name("accuracy", views, ACCURACY, {"yaxis": {"tickformat": ".1%"}}),
        _simple("tokens per second", views, "perf/tokens_per_s", mean=True),
        *[_phases(view, len(views) > 1) for view in views],
        _simple(
            "goodput: share of the time since the first start spent in steps",
            views,
            "perf/goodput",
            {"yaxis": {"tickformat": ".0%"}},
        ),
    ]
    hardware = [
        _simple("temperature of the hottest GPU, °C", views, "perf/gpu_temperature_c"),
        _simple("power of all GPUs, W", views, "perf/gpu_power_w", mean=True),
    ]
    return charts + [chart for chart in hardware if chart.traces]


def _loss(views: list[View], reference: bool) -> Chart:
    alone = len(views) == 1
    traces = []
    for view in views:
        train, validation = view.curve("train/loss"), view.curve("val/loss")
        if alone:
            traces += _line(view, train, "train", line={"color": view.color, "width": 1}, opacity=0.45)
        traces += _first(views, view, smoothed(train), f"train, mean of {train.smoothing} steps")
        traces += _second(views, view, validation, "validation", "solid" if alone else "dash")
        traces += _second(views, view, view.curve("val/loss_ema"), "validation, averaged weights", "dot")
    if traces and (reference or any(is_comparable_to_reference(view.settings) for view in views)):
        traces += _reference([view for view in views if len(view.records.steps)])
    loss_range, is_cut = _loss_range(views)
    dotted = (
        "; dotted: validation of averaged weights" if any(len(view.curve("val/loss_ema")) for view in views) else ""
    )
    notes = [] if alone else [f"Solid: training, smoothed; dashed: validation{dotted}."]
    if is_cut:
        notes.append("The first steps are above the visible range: double-tap to show all.")
    return Chart("loss", traces, {"yaxis": {"range": loss_range}} if loss_range else {}, " ".join(notes))


def _loss_range(views: list[View]) -> tuple[list[float], bool]:
    """Return the range of losses after the initial descent, including every spike; and whether losses lie above it."""
    tops, lows, all_tops = [], [], []
    for view in views:
        for curve in (view.curve("train/loss").finite(), view.curve("val/loss").finite()):
            later = curve.since(int(_DESCENT * view.records.newest)).values
            if len(later):
                lows.append(later.min())
                tops.append(later.max())
                all_tops.append(curve.values.max())
    if not lows:
        return [], False
    margin = 0.05 * (max(tops) - min(lows)) or 0.1
    return [float(min(lows) - margin), float(max(tops) + margin)], bool(max(all_tops) > max(tops) + margin)


def _reference(views: list[View]) -> list[Trace]:
    """Return the reference's loss in the range of the runs, at the steps where the first run reaches equal tokens."""
    scale = REFERENCE_TOKENS_PER_STEP / views[0].settings.batch.tokens_per_step
    begin = min(int(view.records.steps[0]) for view in views)
    end = 1.1 * max(view.records.newest for view in views)
    shown = {step * scale: loss for step, loss in REFERENCE_CURVE.items() if begin <= step * scale <= end}
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": REFERENCE.replace("-", " "),
        "x": list(shown),
        "y": list(shown.values()),
        "line": {"color": _GRAY, "dash": "dot"},
        "hovertemplate": "%{y:.3f} · step %{x:,}",
    }
    return [trace] if shown else []


def _gradients(views: list[View]) -> Chart:
    traces = []
    for view in views:
        traces += _first(views, view, view.curve("train/grad_norm"), "norm", width=1)
        traces += _second(views, view, view.curve("train/clipped_share"), "clipped", "dot", yaxis="y2")
    axis = {"overlaying": "y", "side": "right", "tickformat": ".0%", "range": [0, 1], "showgrid": False}
    layout = {"yaxis": {"rangemode": "tozero"}, "yaxis2": {**axis, "tickmode": "auto"}}
    note = "" if len(views) == 1 else "Solid: norm; dotted: clipped."
    return Chart("gradient norm before clipping, and share of updates clipped", traces, layout, note)


def _has_hellaswag(views: list[View]) -> bool:
    """Return whether HellaSwag is enabled or recorded in any run."""
    return any(view.settings.hellaswag.every or len(view.curve("hellaswag/acc_norm")) for view in views)


def _hellaswag(views: list[View]) -> Chart:
    traces = []
    for view in views:
        normalized = view.curve("hellaswag/acc_norm")
        traces += _band(view, normalized, view.curve("hellaswag/acc_norm_stderr"))
        traces += _first(views, view, normalized, "acc_norm")
        if len(views) == 1:
            traces += _line(view, view.curve("hellaswag/acc"), "acc", line={"color": _COLORS[1], "dash": "dot"})
    layout: dict[str, Any] = {"yaxis": {"tickformat": ".1%"}}
    if any(view.settings.model.preset == "124M" for view in views):
        layout |= {"shapes": [], "annotations": []}
        for (name, accuracy), side in zip(REFERENCE_HELLASWAG.items(), ("top", "bottom"), strict=True):
            layout["shapes"].append(_level(accuracy))
            layout["annotations"].append(_level_text(name, accuracy, side))
    return Chart("HellaSwag", traces, layout, "Band: plus and minus one standard error." if traces else "")


def _by_name(title: str, views: list[View], tags: re.Pattern[str], layout: dict[str, Any] | None = None) -> list[Chart]:
    """Return one chart with a curve for each tag that matches; none if nothing is recorded.

    Args:
        tags: its group is the name of the curve.
    """
    found = {tag: tags.fullmatch(tag) for view in views for tag in view.records.curves}
    names = sorted((match[1], tag) for tag, match in found.items() if match is not None)
    traces = []
    for view in views:
        for number, (name, tag) in enumerate(names):
            if len(views) == 1:
                traces += _line(view, view.curve(tag), name, line={"color": _COLORS[number % len(_COLORS)]})
            else:
                line = {"color": view.color, "dash": _DASHES[number % len(_DASHES)]}
                traces += _line(view, view.curve(tag), f"{view.name}: {name}", line=line)
    return [Chart(title, traces, layout or {})] if traces else []


def _band(view: View, curve: Curve, error: Curve) -> list[Trace]:
    """Return the band of plus and minus one standard error, at the steps that recorded both."""
    steps, here, there = np.intersect1d(curve.steps, error.steps, return_indices=True)
    if not len(steps):
        return []
    low, high = curve.values[here] - error.values[there], curve.values[here] + error.values[there]
    edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": view.color + "33"}
    return [
        {**edge, "name": "low", "x": steps.tolist(), "y": _plain(low)},
        {**edge, "name": "high", "x": steps.tolist(), "y": _plain(high), **fill},
    ]


def _level(height: float) -> dict[str, Any]:
    line = {"color": _GRAY, "dash": "dot", "width": 1}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def _level_text(name: str, height: float, side: str) -> dict[str, Any]:
    """Return the label of a horizontal line.

    Args:
        side: vertical anchor of the text, "top" or "bottom", so that the texts of close levels do not overlap.
    """
    position = {"xref": "paper", "x": 0, "xanchor": "left", "y": height, "yanchor": side}
    return {"text": f"{name} {height:.2%}", "showarrow": False, "font": {"size": 11, "color": _GRAY}, **position}


def _phases(view: View, named: bool) -> Chart:
    """Return the mean time per step, phases stacked; evaluations and saves are distributed over all steps."""
    steps = view.records.steps
    names = ("forward and backward", "update", "evaluation", "saving")
    tags = ("perf/forward_backward_ms", "perf/update_ms", "perf/eval_ms", "perf/save_ms")
    traces = []
    for name, tag, color in zip(names, tags, _COLORS, strict=False):
        area = {"stackgroup": "step", "line": {"color": color, "width": 0.5}}
        traces += _line(view, mean_per_step(view.curve(tag), steps), name, **area)
    waiting = mean_per_step(view.curve("perf/data_ms"), steps)
    traces += _line(view, waiting, "of which waiting for data", line={"color": _GRAY, "dash": "dot"})
    title = "ms per step, by phase" + (f": {view.name}" if named else "")
    return Chart(title, traces, {"yaxis": {"rangemode": "tozero"}})


def _simple(title: str, views: list[View], tag: str, layout: dict[str, Any] | None = None, mean: bool = False) -> Chart:
    """Return the chart of one tag.

    Args:
        mean: draw the running mean; for a single run also the values themselves, faint.
    """
    traces = []
    for view in views:
        curve = view.curve(tag)
        if mean and len(views) == 1:
            traces += _line(view, curve, "each step", line={"color": view.color, "width": 1}, opacity=0.45)
        shown, name = (smoothed(curve), f"mean of {curve.smoothing}") if mean else (curve, view.name)
        traces += _first(views, view, shown, name)
    return Chart(title, traces, {"showlegend": len(views) > 1, **(layout or {})})


def _first(views: list[View], view: View, curve: Curve, name: str, width: float = 2) -> list[Trace]:
    """Return the main curve of a chart, in the run's color; with several runs, it has the run's name."""
    name = name if len(views) == 1 else view.name
    return _line(view, curve, name, line={"color": view.color, "width": width}, legendgroup=view.name)


def _second(views: list[View], view: View, curve: Curve, name: str, dash: str, **style: Any) -> list[Trace]:
    """Return the second curve of a chart, in another color; with several runs, in the run's color."""
    if len(views) == 1:
        return _line(view, curve, name, line={"color": _COLORS[1], "dash": dash}, **style)
    style |= {"legendgroup": view.name, "showlegend": False}
    return _line(view, curve, f"{view.name}: {name}", line={"color": view.color, "dash": dash}, **style)


def _line(view: View, curve: Curve, name: str, **style: Any) -> list[Trace]:
    """Return one trace of ``curve``, thinned; no trace if the curve is empty."""
    if not len(curve):
        return []
    shown = thinned(curve)
    tokens = view.curve("train/tokens")
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(shown) <= _FEW else "lines",
        "name": name,
        "x": shown.steps.tolist(),
        "y": _plain(shown.values),
        "hovertemplate": "%{y} · step %{x:,}",
        **style,
    }
    if len(tokens):
        trace["customdata"] = np.interp(shown.steps, tokens.steps, tokens.values).astype(np.int64).tolist()
        trace["hovertemplate"] += " · %{customdata:.3s} tokens"
    return [trace]


def _plain(values: Any) -> list[float | None]:
    """Replace values that JSON cannot hold by None, which Plotly draws as a gap."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
