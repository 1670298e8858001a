"""The curves of one run or of several as Plotly's figures: plain dictionaries, drawn by the page itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_gpt2.config.settings import Settings
from ds_gpt2.monitoring.reference_curves import (
    REFERENCE,
    REFERENCE_CURVE,
    REFERENCE_HELLASWAG,
    REFERENCE_TOKENS_PER_STEP,
)
from ds_gpt2.tools.report.curves import Curve, Curves, mean_per_step, smoothed, thinned

Trace = dict[str, Any]

_COLOURS = ("#3987e5", "#e07b39", "#2f9e6e", "#b06bd6", "#c9a227", "#d9486e")  # seen on white and on black
_GREY = "#8a8f98"
_FEW = 60  # points that are drawn as points, too
_DESCENT = 0.05  # the first share of a run, in which the loss falls from far above everything later


@dataclass(frozen=True)
class View:
    """A run as it is drawn: its name, and the window of its records."""

    name: str
    settings: Settings
    records: Curves
    colour: str = _COLOURS[0]

    def curve(self, tag: str) -> Curve:
        return self.records.curve(tag)


@dataclass(frozen=True)
class Chart:
    """One picture; nothing to draw where ``traces`` is empty."""

    title: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def views_of(runs: list[tuple[str, Settings, Curves]]) -> list[View]:
    """Each run in a colour of its own."""
    return [View(*run, colour=_COLOURS[number % len(_COLOURS)]) for number, run in enumerate(runs)]


def charts_of(views: list[View], reference: bool = False) -> list[Chart]:
    """All pictures of the report, several runs over each other.

    Args:
        reference: draw the reference's loss, whatever the runs are.
    """
    charts = [
        _loss(views, reference),
        _gradients(views),
        _simple("learning rate", views, "train/lr", {"yaxis": {"exponentformat": "e"}}),
        *([_hellaswag(views)] if _has_hellaswag(views) else []),
        _simple("tokens a second", views, "perf/tokens_per_s", mean=True),
        *[_phases(view, len(views) > 1) for view in views],
        _simple(
            "goodput: share of the time since the first start that went into steps",
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


def is_like_the_reference(settings: Settings) -> bool:
    """Whether a run's curve should look like the reference's."""
    return settings.model.preset == "124M" and settings.batch.tokens_per_step == REFERENCE_TOKENS_PER_STEP


def _loss(views: list[View], reference: bool) -> Chart:
    alone = len(views) == 1
    traces = []
    for view in views:
        train, validation = view.curve("train/loss"), view.curve("val/loss")
        if alone:
            traces += _line(view, train, "train", line={"color": view.colour, "width": 1}, opacity=0.45)
        traces += _first(views, view, smoothed(train), f"train, mean of {train.smoothing} steps")
        traces += _second(views, view, validation, "validation", "solid" if alone else "dash")
    if traces and (reference or any(is_like_the_reference(view.settings) for view in views)):
        traces += _reference([view for view in views if len(view.records.steps)])
    heights, cut_off = _heights(views)
    notes = [] if alone else ["Solid: training, smoothed; dashed: validation."]
    if cut_off:
        notes.append("The steep first steps lie above the picture: a double tap shows all.")
    return Chart("loss", traces, {"yaxis": {"range": heights}} if heights else {}, " ".join(notes))


def _heights(views: list[View]) -> tuple[list[float], bool]:
    """The range of losses once the first descent is over, every spike included; and whether more lies above it."""
    tops, lows, everything = [], [], []
    for view in views:
        for curve in (view.curve("train/loss").finite(), view.curve("val/loss").finite()):
            later = curve.since(int(_DESCENT * view.records.newest)).values
            if len(later):
                lows.append(later.min())
                tops.append(later.max())
                everything.append(curve.values.max())
    if not lows:
        return [], False
    margin = 0.05 * (max(tops) - min(lows)) or 0.1
    return [float(min(lows) - margin), float(max(tops) + margin)], bool(max(everything) > max(tops) + margin)


def _reference(views: list[View]) -> list[Trace]:
    """As far as the runs go, at the steps at which the first of them has seen as many tokens."""
    stretch = REFERENCE_TOKENS_PER_STEP / views[0].settings.batch.tokens_per_step
    begin = min(int(view.records.steps[0]) for view in views)
    end = 1.1 * max(view.records.newest for view in views)
    shown = {step * stretch: loss for step, loss in REFERENCE_CURVE.items() if begin <= step * stretch <= end}
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": REFERENCE.replace("-", " "),
        "x": list(shown),
        "y": list(shown.values()),
        "line": {"color": _GREY, "dash": "dot"},
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
    """Whether a run is set to measure it, or has measured it."""
    return any(view.settings.hellaswag.every or len(view.curve("hellaswag/acc_norm")) for view in views)


def _hellaswag(views: list[View]) -> Chart:
    traces = []
    for view in views:
        normalised = view.curve("hellaswag/acc_norm")
        traces += _band(view, normalised, view.curve("hellaswag/acc_norm_stderr"))
        traces += _first(views, view, normalised, "acc_norm")
        if len(views) == 1:
            traces += _line(view, view.curve("hellaswag/acc"), "acc", line={"color": _COLOURS[1], "dash": "dot"})
    layout: dict[str, Any] = {"yaxis": {"tickformat": ".1%"}}
    if any(view.settings.model.preset == "124M" for view in views):
        layout |= {"shapes": [], "annotations": []}
        for (name, accuracy), side in zip(REFERENCE_HELLASWAG.items(), ("top", "bottom"), strict=True):
            layout["shapes"].append(_level(accuracy))
            layout["annotations"].append(_level_text(name, accuracy, side))
    return Chart("HellaSwag", traces, layout, "The band is one standard error wide on either side." if traces else "")


def _band(view: View, curve: Curve, error: Curve) -> list[Trace]:
    """One standard error below to one above, where both were recorded."""
    steps, here, there = np.intersect1d(curve.steps, error.steps, return_indices=True)
    if not len(steps):
        return []
    low, high = curve.values[here] - error.values[there], curve.values[here] + error.values[there]
    edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": view.colour + "33"}
    return [
        {**edge, "name": "low", "x": steps.tolist(), "y": _plain(low)},
        {**edge, "name": "high", "x": steps.tolist(), "y": _plain(high), **fill},
    ]


def _level(height: float) -> dict[str, Any]:
    line = {"color": _GREY, "dash": "dot", "width": 1}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def _level_text(name: str, height: float, side: str) -> dict[str, Any]:
    """``side``: where the level is in the text's box; the texts of close levels go apart."""
    place = {"xref": "paper", "x": 0, "xanchor": "left", "y": height, "yanchor": "top" if side == "top" else "bottom"}
    return {"text": f"{name} {height:.2%}", "showarrow": False, "font": {"size": 11, "color": _GREY}, **place}


def _phases(view: View, named: bool) -> Chart:
    """What a step costs on average, phase above phase: evaluation and saving are shared out over all steps."""
    steps = view.records.steps
    names = ("forward and backward", "update", "evaluation", "saving")
    tags = ("perf/forward_backward_ms", "perf/update_ms", "perf/eval_ms", "perf/save_ms")
    traces = []
    for name, tag, colour in zip(names, tags, _COLOURS, strict=False):
        area = {"stackgroup": "step", "line": {"color": colour, "width": 0.5}}
        traces += _line(view, mean_per_step(view.curve(tag), steps), name, **area)
    waiting = mean_per_step(view.curve("perf/data_ms"), steps)
    traces += _line(view, waiting, "of it waiting for data", line={"color": _GREY, "dash": "dot"})
    title = "ms a step, by phase" + (f": {view.name}" if named else "")
    return Chart(title, traces, {"yaxis": {"rangemode": "tozero"}})


def _simple(title: str, views: list[View], tag: str, layout: dict[str, Any] | None = None, mean: bool = False) -> Chart:
    """One tag; ``mean``: its running mean, and of a single run the values themselves, faint."""
    traces = []
    for view in views:
        curve = view.curve(tag)
        if mean and len(views) == 1:
            traces += _line(view, curve, "each step", line={"color": view.colour, "width": 1}, opacity=0.45)
        shown, name = (smoothed(curve), f"mean of {curve.smoothing}") if mean else (curve, view.name)
        traces += _first(views, view, shown, name)
    return Chart(title, traces, {"showlegend": len(views) > 1, **(layout or {})})


def _first(views: list[View], view: View, curve: Curve, name: str, width: float = 2) -> list[Trace]:
    """The main curve of a chart: in the run's colour, and among several runs under the run's name."""
    name = name if len(views) == 1 else view.name
    return _line(view, curve, name, line={"color": view.colour, "width": width}, legendgroup=view.name)


def _second(views: list[View], view: View, curve: Curve, name: str, dash: str, **style: Any) -> list[Trace]:
    """A curve beside the main one: in a colour of its own, or in the run's where there are several."""
    if len(views) == 1:
        return _line(view, curve, name, line={"color": _COLOURS[1], "dash": dash}, **style)
    style |= {"legendgroup": view.name, "showlegend": False}
    return _line(view, curve, f"{view.name}: {name}", line={"color": view.colour, "dash": dash}, **style)


def _line(view: View, curve: Curve, name: str, **style: Any) -> list[Trace]:
    """A trace of ``curve``, thinned; none if it is empty."""
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
    """JSON has no NaN; Plotly leaves a gap where there is none."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
