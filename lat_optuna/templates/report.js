"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const $ = (id) => document.getElementById(id);
  const front = $("figure-front");
  const ring = data.figures.front.layout.shapes?.length ?? 0; // the shape that marks the chosen point comes last

  // ------------------------------------------------------------------ figures
  const places = Object.fromEntries(Object.keys(data.figures).map((name) => [name, $("figure-" + name)]));
  const drawn = new Set();
  let chosen = null;

  function draw(name) {
    if (drawn.has(name)) return;
    const { data: traces, layout } = data.figures[name];
    const place = places[name];
    const narrow = place.clientWidth < 520;
    if (narrow) layout.legend = { ...layout.legend, font: { size: 11 } };
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13 };
    if (name === "front" && points.length) layout.shapes = [...(layout.shapes ?? []), mark()];
    Plotly.newPlot(place, traces, layout, {
      responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    });
    drawn.add(name);
    if (name === "front" && points.length) {
      const frontTrace = traces.findIndex((trace) => trace.name === "Pareto front");
      front.on("plotly_click", (event) => {
        const hit = event.points.find((point) => point.curveNumber === frontTrace);
        if (hit) pick(hit.pointIndex);
      });
    }
  }

  // Plotly is nine tenths of this page. It is compiled when the page, with its budget, is on the screen, and a figure
  // is drawn when it comes near.
  function start() {
    if (!globalThis.Plotly) {
      const script = document.createElement("script");
      script.textContent = $("plotly").textContent;
      document.head.append(script);
    }
    draw("front");
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        draw(entry.target.id.replace("figure-", ""));
      }
    }, { rootMargin: "300px" });
    for (const [name, place] of Object.entries(places)) if (!drawn.has(name)) near.observe(place);
  }
  addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => setTimeout(start)));

  // A figure has a fixed width in print, whatever the window's; and all of them are there.
  addEventListener("beforeprint", () => {
    start();
    Object.keys(places).forEach(draw);
    resize({ width: 680 });
  });
  addEventListener("afterprint", () => resize({ width: null, autosize: true }));
  function resize(layout) {
    for (const name of drawn) Plotly.relayout(places[name], layout);
  }

  if (!points.length) return;

  // ------------------------------------------------------------------ choosing
  const slider = $("budget");

  function mark() {
    const around = { type: "circle", xsizemode: "pixel", ysizemode: "pixel", x0: -10, x1: 10, y0: -10, y1: 10 };
    const { cost, metric } = points[chosen ?? 0];
    return { ...around, xanchor: cost, yanchor: metric, visible: chosen !== null, line: { color: "#d6336c", width: 3 } };
  }

  // The best point that costs at most the budget: points lie in rising cost, and so in rising quality.
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
    chosen = index < 0 ? null : index;
    $("budget-shown").textContent = Number(budget.toFixed(6)) + "×";
    $("no-point").hidden = index >= 0;
    $("choice").hidden = index < 0;
    if (drawn.has("front")) {
      const { xanchor, yanchor, visible } = mark();
      const shape = `shapes[${ring}].`;
      Plotly.relayout(front, { [shape + "xanchor"]: xanchor, [shape + "yanchor"]: yanchor, [shape + "visible"]: visible });
    }
    if (index < 0) {
      $("no-point").textContent = `No point costs that little. The smallest costs ${points[0].cost.toFixed(4)}×.`;
      return;
    }
    const point = points[index];
    for (const [id, text] of Object.entries(point.tiles)) if ($("tile-" + id)) $("tile-" + id).textContent = text;
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
  // What loses nothing and saves something, else what half of the compute buys.
  const saving = data.lossless !== null && points[data.lossless].cost < 1;
  pick(saving ? data.lossless : Math.max(0, within(0.5)));
})();
