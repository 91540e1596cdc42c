"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const $ = (id) => document.getElementById(id);
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

  const drawn = [];
  function draw(name) {
    const figure = data.figures[name];
    const place = $("figure-" + name);
    const narrow = place.clientWidth < 520;
    if (narrow) figure.layout.legend = { ...figure.layout.legend, font: { size: 11 } };
    figure.layout.font = { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13 };
    Plotly.newPlot(place, figure.data, figure.layout, { ...config, displayModeBar: narrow ? false : "hover" });
    drawn.push(place);
  }
  // The front comes first, so that a budget can be chosen while the others are being drawn.
  draw("front");
  for (const name of Object.keys(data.figures)) if (name !== "front") setTimeout(draw, 0, name);

  // A figure has a fixed width in print, whatever the window's.
  addEventListener("beforeprint", () => resize({ width: 680 }));
  addEventListener("afterprint", () => resize({ width: null, autosize: true }));
  function resize(layout) {
    for (const place of drawn) Plotly.relayout(place, layout);
  }

  if (!points.length) return;

  // ------------------------------------------------------------------ choosing
  const front = $("figure-front");
  const slider = $("budget");
  const ring = { mode: "markers", name: "chosen", showlegend: false, hoverinfo: "skip",
    marker: { size: 20, symbol: "circle-open", color: "#d6336c", line: { width: 3 } } };
  Plotly.addTraces(front, { ...ring, x: [points[0].cost], y: [points[0].metric] });
  const ringIndex = front.data.length - 1;

  // The best point that costs at most the budget: points lie in rising cost, and so in rising metric.
  const within = (budget) => points.findLastIndex((point) => point.cost <= budget + 1e-9);

  // The shortest number that, as a budget, means this point and no other.
  function budgetOf(index) {
    for (let digits = 2; digits < 8; digits++) {
      const budget = Math.ceil(points[index].cost * 10 ** digits - 1e-9) / 10 ** digits;
      if (within(budget) === index) return budget;
    }
    return points[index].cost;
  }

  const bars = points[0].lengths.map((_, layer) => {
    const row = document.createElement("div");
    row.innerHTML = '<span class="label"></span><span class="track"><i></i></span><b></b>';
    row.firstChild.textContent = "layer " + (layer + 1);
    $("bars").append(row);
    return { fill: row.querySelector("i"), count: row.querySelector("b") };
  });

  function show(index, budget) {
    $("budget-shown").textContent = Number(budget.toFixed(6)) + "×";
    $("no-point").hidden = index >= 0;
    $("choice").hidden = index < 0;
    Plotly.restyle(front, { visible: index >= 0 }, [ringIndex]);
    if (index < 0) {
      $("no-point").textContent = `No point costs that little. The smallest costs ${points[0].cost.toFixed(4)}×.`;
      return;
    }
    const point = points[index];
    $("chosen-metric").textContent = point.metric.toFixed(2) + " %";
    $("chosen-metric-name").textContent = data.metric;
    $("chosen-cost").textContent = point.cost.toFixed(3) + "×";
    $("chosen-change-tile").hidden = data.standard === null;
    if (data.standard !== null) {
      const change = point.metric - data.standard;
      $("chosen-change").textContent = (change < 0 ? "−" : "+") + Math.abs(change).toFixed(2);
    }
    $("chosen-config").textContent = point.text;
    $("chosen-origin").textContent = point.origin;
    point.lengths.forEach((length, layer) => {
      bars[layer].fill.style.width = (100 * length) / data.maxLength + "%";
      bars[layer].count.textContent = length;
    });
    $("bars").setAttribute("aria-label", "Word vectors kept by layer, of " + data.maxLength + ": " + point.text);
    const text = String(Number(budget.toFixed(6)));
    $("command").textContent = data.command.replace("{budget}", text);
    $("python").textContent = data.python.replace("{budget}", text);
    Plotly.restyle(front, { x: [[point.cost]], y: [[point.metric]] }, [ringIndex]);
  }

  function pick(index) {
    const budget = budgetOf(index);
    slider.value = budget;
    show(index, budget);
  }

  // One step to the left of the smallest point, to say what lies there.
  slider.min = (Math.floor(points[0].cost * 200) / 200 - 0.01).toFixed(3);
  slider.max = Math.max(1, Math.ceil(points.at(-1).cost * 200) / 200);
  slider.addEventListener("input", () => show(within(+slider.value), +slider.value));
  const presets = { smallest: 0, lossless: data.lossless, best: points.length - 1 };
  for (const button of document.querySelectorAll("[data-pick]")) {
    const index = presets[button.dataset.pick];
    button.hidden = index === null;
    button.addEventListener("click", () => pick(index));
  }
  const frontTrace = front.data.findIndex((trace) => trace.name === "Pareto front");
  front.on("plotly_click", (event) => {
    const hit = event.points.find((point) => point.curveNumber === frontTrace);
    if (hit) pick(hit.pointIndex);
  });
  pick(data.lossless ?? Math.max(0, within(0.5)));
})();
