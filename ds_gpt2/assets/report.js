// Draws the charts of the report with Plotly. Touch scrolls the page; dragging with a mouse zooms.
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
