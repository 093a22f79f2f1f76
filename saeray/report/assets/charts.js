/* The pictures: frontier, dead and dense, training curves, densities. */
"use strict";

const charts = (() => {
  const { data, short, colour } = saeray;
  const { byId, visible, colourOf, shapeOf, onChange, switchOf, fill } = report;
  const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "reset", scrollZoom: false };

  function axisStyle(more = {}) {
    return {
      gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false,
      tickfont: { size: 12 }, automargin: true, fixedrange: window.innerWidth < 800, ...more,
    };
  }
  /** Ticks at 1, 2 and 5 of each decade, as a reader of L0 thinks. */
  function logAxis(values, title) {
    const positive = values.filter((v) => v > 0);
    const [low, high] = [Math.min(...positive), Math.max(...positive)];
    const decades = Math.log10(high / low);
    const marks = decades > 2.6 ? [1] : decades > 1.1 ? [1, 2, 5] : [1, 2, 3, 5, 7];
    const ticks = [];
    for (let d = -12; d < 13; d += 1) {
      for (const m of marks) {
        const v = m * 10 ** d;
        if (v >= low / 2 && v <= high * 2) ticks.push(v);
      }
    }
    const pad = 0.06 * Math.max(0.3, Math.log10(high / low));
    return axisStyle({
      type: "log", title: { text: title }, tickvals: ticks, ticktext: ticks.map((v) => short(v, 3)),
      range: [Math.log10(low) - pad, Math.log10(high) + pad],
    });
  }
  function layout(x, y, more = {}) {
    return {
      xaxis: x, yaxis: y, showlegend: false, hovermode: "closest",
      margin: { l: 56, r: 14, t: 10, b: 46 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
      ...more,
    };
  }
  /** Draws into a place; `extra` gives lines for the words beside the pointer. */
  function draw(place, traces, shape, extra = () => []) {
    if (!traces.length) {
      Plotly.purge(place);
      place.classList.add("empty");
      place.textContent = "There is nothing to draw here yet.";
      return;
    }
    if (place.classList.contains("empty")) {
      place.classList.remove("empty");
      place.textContent = "";
    }
    const heard = place.dataset.heard;
    Plotly.react(place, traces, shape, CONFIG);
    place.extra = extra;
    if (heard) return;
    place.dataset.heard = "yes";
    const saeAt = (event) => {
      const point = event.points.find((p) => p.data.saes);
      return point && [report.saes[point.data.saes[point.data.saes.length > 1 ? point.pointIndex : 0]], point];
    };
    place.on("plotly_hover", (event) => {
      const [sae, point] = saeAt(event) || [];
      if (sae) report.showTip(sae, event.event, place.extra(point));
    });
    place.on("plotly_unhover", report.hideTip);
    place.on("plotly_click", (event) => {
      const [sae] = saeAt(event) || [];
      if (sae) { report.hideTip(); location.hash = `sae-${sae.index}`; }
    });
  }

  function scatter(saes, figure, size) {
    const on = figure in { ce_loss_score: 1, fvu: 1, kl_div: 1, mcc: 1 } ? new Set(report.frontier(visible(), figure)) : new Set(saes);
    return {
      type: "scatter", mode: "markers", hoverinfo: "none", cliponaxis: false, saes: saes.map((s) => s.index),
      x: saes.map((s) => s.figures.l0), y: saes.map((s) => s.figures[figure]),
      marker: {
        size, color: saes.map(colourOf), symbol: saes.map(shapeOf),
        opacity: saes.map((s) => (on.has(s) || !s.ended ? 1 : 0.5)),
        line: { width: saes.map((s) => (s.ended ? 0 : 1.5)), color: saes.map(colourOf) },
      },
    };
  }
  const drawn = (figure) => visible().filter((s) => s.figures.l0 > 0 && s.figures[figure] !== null && s.figures[figure] !== undefined);

  /* --- the frontier --- */

  const MEANING = {
    ce_loss_score: "CE loss score: 1 as the model is, 0 as with zeros in the place of the activations.",
    fvu: "FVU: fraction of variance unexplained, 0 is perfect.",
    kl_div: "KL divergence from the model as it is to the model with the SAE in place, nats per token.",
    mcc: "MCC: mean |cos| of the known features to those that are matched to them, 1 is perfect.",
  };
  let by = data.frontiers.find((f) => report.saes.some((s) => s.figures[f] !== null)) || "fvu";
  function frontier() {
    const saes = drawn(by);
    const on = report.frontier(visible(), by).filter((s) => s.figures.l0 > 0);
    const traces = [];
    if (on.length > 1) {
      traces.push({
        type: "scatter", mode: "lines", hoverinfo: "skip", x: on.map((s) => s.figures.l0), y: on.map((s) => s.figures[by]),
        line: { color: colour("--muted"), width: 1.2, dash: "dot" },
      });
    }
    if (saes.length) traces.push(scatter(saes, by, saes.length > 60 ? 10 : 12));
    const l0s = saes.map((s) => s.figures.l0);
    const kind = by === "kl_div" ? { type: "log" } : {};
    const y = by === "kl_div" ? logAxis(saes.map((s) => s.figures.kl_div), data.figures.kl_div) : axisStyle({ title: { text: data.figures[by] }, ...kind });
    draw(byId("frontier-plot"), traces, saes.length ? layout(logAxis(l0s, "L0 (mean active features per token)"), y) : {});
    byId("frontier-note").textContent =
      `${MEANING[by] || ""} Held-out text. The dotted line joins the SAEs that no other one is both sparser and better than; others are paler. Point at an SAE for its figures, click to open it.`;
  }
  switchOf(byId("frontier-by"), data.frontiers.map((f) => [f, data.figures[f]]), by, (v) => { by = v; frontier(); });
  onChange(frontier);

  /* --- dead and dense --- */

  const SHARES = {
    dead_share: "Share of features that fired on less than dead_feature_threshold of the tokens of the last full feature_sampling_window.",
    never_fired_share: "Share of features that fired on no held-out token; with few held-out tokens also rare ones.",
    dense_share: "Share of features that fire on more than 10 % of held-out tokens.",
  };
  const shares = Object.keys(SHARES).filter((f) => f in data.figures);
  let share = shares[0];
  function dead() {
    const saes = share ? drawn(share) : [];
    byId("dead-note").textContent = SHARES[share] || "";
    const y = axisStyle({ title: { text: data.figures[share] }, tickformat: ".2~%", rangemode: "tozero" });
    if (!saes.some((s) => s.figures[share] > 0)) y.range = [0, 0.1];
    draw(byId("dead-plot"), saes.length ? [scatter(saes, share, 9)] : [],
      saes.length ? layout(logAxis(saes.map((s) => s.figures.l0), "L0"), y) : {},
      (point) => [[data.figures[share], saeray.percent(point.y)]]);
  }
  switchOf(byId("dead-by"), shares.map((f) => [f, data.figures[f]]), share, (v) => { share = v; dead(); });
  onChange(dead);

  /* --- training curves --- */

  const CURVES = {
    "losses/overall_loss": "loss", "losses/mse_loss": "MSE loss", "losses/l1_loss": "L1 loss", "losses/l0_loss": "L0 loss",
    "metrics/l0": "L0", "metrics/fvu": "FVU", "metrics/explained_variance": "explained variance",
    "eval/l0": "L0, held out", "eval/fvu": "FVU, held out", "eval/explained_variance": "explained variance, held out",
    "eval/CE_loss_score": "CE loss score", "eval/kl_div_with_sae": "KL divergence",
    "sparsity/dead_features": "silent for the window", "sparsity/below_dead_feature_threshold": "dead features",
    "details/current_learning_rate": "learning rate",
  };
  const logged = [...new Set(report.saes.flatMap((s) => Object.keys(s.curves)))];
  const order = [...Object.keys(CURVES).filter((k) => logged.includes(k)), ...logged.filter((k) => !(k in CURVES)).sort()];
  const held = (key) => (key.startsWith("eval/") ? ", held out" : "");
  const curveName = (key) => CURVES[key] || key.replace(/^\w+\//, "").replaceAll("_", " ") + held(key);
  const lined = (traces) => ({ opacity: traces > 30 ? 0.55 : 0.85, width: traces > 30 ? 1.1 : 1.6 });
  fill(byId("curve-of"), order.map((k) => [k, curveName(k)]), order[0]);
  function curves() {
    const key = byId("curve-of").value;
    const among = byId("curve-frontier").checked ? report.onAny(visible()) : new Set(visible());
    const saes = [...among].filter((s) => s.curves[key]);
    const look = lined(saes.length);
    const log = byId("curve-log").checked;
    const traces = saes.map((s) => ({
      type: "scatter", mode: s.curves[key][0].length < 12 ? "lines+markers" : "lines", hoverinfo: "none", saes: [s.index],
      x: s.curves[key][0], y: s.curves[key][1], opacity: look.opacity, connectgaps: true,
      line: { color: colourOf(s), width: look.width }, marker: { size: 5, color: colourOf(s) },
    }));
    const shape = layout(axisStyle({ title: { text: "training tokens" }, tickformat: "~s" }),
      axisStyle({ title: { text: curveName(key) }, type: log ? "log" : "linear", exponentformat: "power", ...(log ? {} : { tickformat: "~g" }) }));
    draw(byId("curve-plot"), traces, shape, (point) => [["tokens", point.x], [curveName(key), point.y]]);
  }
  for (const id of ["curve-of", "curve-log", "curve-frontier"]) byId(id).addEventListener("change", curves);
  onChange(curves);

  /* --- densities --- */

  const MOST = 12; // SAEs whose densities are all drawn without being asked for
  const edges = data.edges || [];
  const centres = edges.slice(1, -1).map((e, i) => (e + edges[i + 2]) / 2); // the first bin: never
  function densityTrace(sae, look = { opacity: 1, width: 1.6 }) {
    const all = sae.d_sae || 1;
    return {
      type: "scatter", mode: "lines", hoverinfo: "none", saes: [sae.index], x: centres, y: sae.density.slice(1).map((n) => n / all),
      line: { color: colourOf(sae), width: look.width, shape: "hvh" }, opacity: look.opacity,
    };
  }
  function densityLayout(saes) {
    const least = Math.min(...saes.flatMap((s) => centres.filter((_, i) => s.density[i + 1] > 0)), -3);
    const ticks = Array.from({ length: 11 }, (_, i) => -i);
    return layout(
      axisStyle({
        title: { text: "share of tokens a feature fires on" }, range: [least - 0.2, 0], tickvals: ticks,
        ticktext: ticks.map((t) => (t === 0 ? "1" : t > -5 ? `${10 ** (t + 2)} %`.replace("100 %", "1") : `1e${t}`)),
      }),
      axisStyle({ title: { text: "share of features" }, tickformat: ".2~%", rangemode: "tozero" }),
    );
  }
  byId("density-frontier").checked = report.saes.length > MOST;
  function density() {
    const among = byId("density-frontier").checked ? report.onAny(visible()) : new Set(visible());
    const saes = [...among].filter((s) => s.density && edges.length);
    const look = lined(saes.length);
    draw(byId("density-plot"), saes.map((s) => densityTrace(s, look)), saes.length ? densityLayout(saes) : {},
      (point) => [["fire on", `10^${point.x.toFixed(1)} of tokens`], ["of features", saeray.percent(point.y)]]);
  }
  byId("density-frontier").addEventListener("change", density);
  onChange(density);

  return { draw, layout, axisStyle, densityTrace, densityLayout, curveName, order };
})();
