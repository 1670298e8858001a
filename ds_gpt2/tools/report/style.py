"""How the page looks, and the few lines of JavaScript that hand the charts to Plotly."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #666c75; --line: #dfe2e6; --back: #fff; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --faint: #989fa9; --line: #33383f; --back: #14171a; --box: #1d2125; }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 0.5rem 0.9rem 3rem; }
h1 { font-size: 1.35rem; margin: 0.6rem 0 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 0; }
p { margin: 0.5rem 0; }
.faint { color: var(--faint); font-size: 0.88rem; }
.verdict { background: var(--box); border-left: 4px solid var(--faint); padding: 0.6rem 0.8rem; border-radius: 4px; }
.running, .finished { border-color: #2f9e6e; }
.stopped { border-color: #c9a227; }
.silent { border-color: #d9486e; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
td, th { padding: 0.22rem 0.9rem 0.22rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); }
.figures td { white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4rem 0; padding: 0.6rem 0.8rem; border-radius: 4px;
  background: var(--box); font: 0.85rem/1.45 ui-monospace, monospace; }
summary { cursor: pointer; padding: 0.25rem 0; }
.chart { height: 20rem; }
"""

# A finger scrolls the page; with a mouse one drags a box to look closer.
SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const finger = matchMedia("(pointer: coarse)").matches;

function template() {
  const axis = { gridcolor: dark.matches ? "#2b3036" : "#e8eaed", zeroline: false, automargin: true };
  const text = dark.matches ? "#c3c8cf" : "#3c4148";
  const modebar = { bgcolor: "rgba(0,0,0,0)", color: text, activecolor: "#3987e5" };
  return { layout: { font: { color: text, size: 12 }, xaxis: axis, yaxis: axis, modebar } };
}

function draw() {
  for (const chart of charts) {
    const base = {
      template: template(), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      margin: { l: 44, r: 12, t: 26, b: 34 }, dragmode: finger ? false : "zoom",
      legend: { orientation: "h", y: -0.12, yanchor: "top" }, showlegend: true, xaxis: { tickformat: ",d" },
    };
    const buttons = [["zoom2d", "pan2d", "autoScale2d", "resetScale2d"]];
    const config = { responsive: true, displaylogo: false, modeBarButtons: buttons };
    Plotly.react(chart.id, chart.traces, { ...base, ...chart.layout }, config);
  }
}

dark.addEventListener("change", draw);
draw();
"""
