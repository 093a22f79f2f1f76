/* Tables that follow the filters, one SAE in its drawer, and what begins when all is there. */
"use strict";

(() => {
  const { data, el, short, percent, breakable, sortable } = saeray;
  const { byId, visible, onChange, fill, saes } = report;
  const open = (sae) => { location.hash = `sae-${sae.index}`; };
  const SHARES = new Set(["dead_share", "never_fired_share", "dense_share", "features_found"]);
  const shown = (figure, value) => (SHARES.has(figure) ? percent(value) : short(value));

  /* --- the best in each band of L0 --- */

  const BOUNDS = [0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, Infinity];
  function bands() {
    const judged = visible().filter((s) => ["done", "stopped"].includes(s.status) && s.figures.l0 !== null);
    const rows = [];
    for (let i = 0; i + 1 < BOUNDS.length; i += 1) {
      const inside = judged.filter((s) => s.figures.l0 >= BOUNDS[i] && s.figures.l0 < BOUNDS[i + 1]);
      if (!inside.length) continue;
      const cells = data.frontiers.map((figure) => {
        const with_ = inside.filter((s) => s.figures[figure] !== null);
        if (!with_.length) return el("td", {}, "–");
        const best = with_.reduce((a, b) => (report.better(figure, b.figures[figure], a.figures[figure]) ? b : a));
        return el("td", {}, el("a", { href: `#sae-${best.index}` }, breakable(best.label)),
          el("div", { class: "muted" }, `${short(best.figures[figure])} at L0 ${short(best.figures.l0, 3)}`));
      });
      const bound = BOUNDS[i + 1] === Infinity ? `${BOUNDS[i]} and more` : `${BOUNDS[i]} – ${BOUNDS[i + 1]}`;
      rows.push(el("tr", {}, el("th", { scope: "row" }, bound), el("td", { class: "num" }, String(inside.length)), ...cells));
    }
    const heads = ["L0", "SAEs", ...data.frontiers.map((f) => `by ${data.figures[f]}`)];
    byId("bands").replaceChildren(
      el("thead", {}, el("tr", {}, heads.map((h, i) => el("th", { class: i === 1 ? "num" : null }, h)))),
      el("tbody", {}, rows.length ? rows : el("tr", {}, el("td", { colspan: heads.length, class: "muted" }, "No SAE has finished yet."))),
    );
  }
  onChange(bands);

  /* --- any figure over any two axes --- */

  const heat = { figure: byId("heat-figure"), x: byId("heat-x"), y: byId("heat-y") };
  const named = report.varying.map((a) => [a.key, a.label]);
  const full = report.varying.filter((a) => !a.values.includes("–"));
  const choice = full.length > 1 ? full : report.varying;
  const sparse = choice.find((a) => ["l1_coefficient", "l0_coefficient", "k", "target_l0"].includes(a.key)) || choice[0];
  const beside = choice.find((a) => a.key === "lr" && a !== sparse) || choice.find((a) => a !== sparse);
  fill(heat.figure, Object.entries(data.figures), data.frontiers[0] || "fvu");
  fill(heat.x, [["", "–"], ...named], sparse?.key);
  fill(heat.y, [["", "–"], ...named], beside?.key);
  function heatMap() {
    const figure = heat.figure.value;
    const [across, down] = [report.axisOf(heat.x.value), report.axisOf(heat.y.value)];
    const all = visible().filter((s) => s.figures[figure] !== null && s.figures[figure] !== undefined);
    const has = (a, v) => (s) => !a || a.value(s) === v;
    const valuesOf = (a) => (a ? a.values.filter((v) => v !== "–" && all.some(has(a, v))) : [null]);
    const cells = valuesOf(down).map((v) => valuesOf(across).map((u) => all.filter(has(across, u)).filter(has(down, v))));
    const mean = (of) => of.reduce((sum, s) => sum + s.figures[figure], 0) / of.length;
    const means = cells.flat().filter((of) => of.length).map(mean);
    const [low, high] = [Math.min(...means), Math.max(...means)];
    const several = cells.flat().some((of) => of.length > 1);
    const cell = (of) => {
      if (!of.length) return el("td", { class: "cell muted" }, "");
      const t = high > low ? (mean(of) - low) / (high - low) : 0.5;
      const deep = report.LESS_IS_BETTER.has(figure) ? 1 - t : t;
      const made = el("td", {
        class: "cell", "data-sae": of.length === 1 ? of[0].index : null, title: of.map((s) => s.label).join("\n"),
        style: `background: color-mix(in srgb, var(--accent) ${(6 + 54 * deep).toFixed(0)}%, var(--surface))`,
      }, shown(figure, mean(of)));
      if (of.length === 1) made.addEventListener("click", () => open(of[0]));
      return made;
    };
    const label = (a, v) => (a ? short(v) : "all");
    const head = el("tr", {}, el("th", {}, down ? `${down.label} ↓` : "", across ? ` ${across.label} →` : ""),
      valuesOf(across).map((u) => el("th", {}, label(across, u))));
    const body = cells.map((row, i) => el("tr", {}, el("th", { scope: "row" }, label(down, valuesOf(down)[i])), row.map(cell)));
    byId("heat-map").replaceChildren(el("thead", {}, head), el("tbody", {}, body));
    byId("heat-note").textContent =
      (several ? "Where several SAEs have the same two values, their mean." : "Click a cell to open its SAE.") +
      (report.LESS_IS_BETTER.has(figure) ? " Deeper is lower, and better." : " Deeper is higher.");
  }
  for (const select of Object.values(heat)) select.addEventListener("change", heatMap);
  onChange(heatMap);

  /* --- all SAEs --- */

  const table = byId("table");
  sortable(table);
  const tableRows = [...table.tBodies[0].rows];
  tableRows.forEach((row) => row.addEventListener("click", (e) => {
    if (!e.target.closest("a")) open(saes[Number(row.dataset.sae)]);
  }));
  onChange(() => {
    const there = new Set(visible().map((s) => s.index));
    tableRows.forEach((row) => { row.hidden = !there.has(Number(row.dataset.sae)); });
  });

  /* --- one SAE --- */

  const drawer = byId("sae");
  function pairs(entries) {
    return el("dl", {}, entries.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
  }
  function show(sae) {
    byId("sae-name").replaceChildren(...breakable(sae.label));
    const figures = Object.entries(data.figures).filter(([f]) => sae.figures[f] !== null && sae.figures[f] !== undefined);
    const on = sae.on.map((f) => data.figures[f]).join(", ");
    const uri = data.uris[sae.sweep];
    const select = el("select", {}, charts.order.filter((k) => sae.curves[k]).map((k) => el("option", { value: k }, charts.curveName(k))));
    const [curve, density] = [el("div", { class: "plot" }), el("div", { class: "plot" })];
    byId("sae-body").replaceChildren(...[
      el("p", {}, el("span", { class: `badge ${{ done: "good", failed: "bad", interrupted: "warn" }[sae.status] || "muted"}` }, sae.status),
        el("span", { class: "muted small" }, ` ${short(sae.tokens)} of ${short(sae.planned)} tokens`, sae.d_sae ? ` · ${short(sae.d_sae)} features` : "", on ? ` · on the frontier by ${on}` : "")),
      sae.error ? el("pre", { class: "bad" }, sae.error) : null,
      el("p", {}, ...[
        sae.features ? el("a", { href: sae.features }, "Look at its features →") : null,
        sae.features && sae.final ? " · " : null,
        sae.final ? el("a", { href: sae.final, class: "small" }, "its files") : null,
      ].filter(Boolean)),
      el("dl", { class: "three" }, figures.map(([f, label]) => el("div", {}, el("dt", {}, label), el("dd", {}, shown(f, sae.figures[f]))))),
      sae.density ? el("h3", {}, "How often features fire") : null,
      sae.density ? density : null,
      select.options.length ? el("h3", {}, "Training ", select) : null,
      select.options.length ? curve : null,
      el("h3", {}, "What it has of its own"),
      pairs(Object.entries(sae.fields).map(([k, v]) => [el("code", {}, k), v === null ? "–" : typeof v === "object" ? JSON.stringify(v) : String(v)])),
      ["done", "stopped"].includes(sae.status) ? el("h3", {}, "To load it") : null,
      ["done", "stopped"].includes(sae.status)
        ? el("pre", {}, `import saeray\nsae = saeray.load_sweep(${JSON.stringify(uri)}).load(${JSON.stringify(sae.name)})`) : null,
      el("details", {}, el("summary", {}, "What it has in common with the others"),
        pairs(Object.entries(data.common).map(([k, v]) => [el("code", {}, k), v === null ? "–" : typeof v === "object" ? JSON.stringify(v) : String(v)]))),
    ].filter(Boolean));
    if (!drawer.open) drawer.showModal();
    drawer.scrollTop = 0;
    const drawCurve = () => {
      const [x, y] = sae.curves[select.value];
      charts.draw(curve, [{ type: "scatter", mode: "lines", x, y, line: { color: saeray.colour("--accent"), width: 1.6 } }],
        charts.layout(charts.axisStyle({ tickformat: "~s" }), charts.axisStyle({ tickformat: "~g" })));
    };
    if (sae.density && data.edges) charts.draw(density, [charts.densityTrace(sae)], charts.densityLayout([sae]));
    if (select.options.length) { drawCurve(); select.addEventListener("change", drawCurve); }
  }
  function fromAddress() {
    const match = /^#sae-(\d+)$/.exec(location.hash);
    if (match && saes[Number(match[1])]) show(saes[Number(match[1])]);
    else if (drawer.open) drawer.close();
  }
  window.addEventListener("hashchange", fromAddress);
  byId("sae-close").addEventListener("click", () => drawer.close());
  drawer.addEventListener("click", (e) => { if (e.target === drawer) drawer.close(); });
  drawer.addEventListener("close", () => {
    if (/^#sae-/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
  });

  /* --- the first picture at once, the others one by one while nothing else is to be done --- */

  report.legend();
  const waiting = [...report.drawers];
  function next() {
    waiting.shift()?.();
    if (waiting.length) setTimeout(next, 0);
    else { document.documentElement.dataset.ready = "yes"; fromAddress(); }
  }
  next();
  saeray.onTheme(report.changed);

  /* --- on paper: light, as wide as the sheet, nothing folded --- */

  const PAPER = 1020; // CSS pixels of a landscape A4 sheet within its margins
  const [TALL, LOW] = [420, 280]; // as report.css has them for print
  let before = null;
  const plots = () => [...document.querySelectorAll("main > section .plot, .columns .plot")].filter((p) => p.data);
  window.addEventListener("beforeprint", () => {
    before = { theme: document.documentElement.dataset.theme, closed: [...document.querySelectorAll("details:not([open])")] };
    before.closed.forEach((d) => { d.open = true; });
    document.documentElement.dataset.theme = "light";
    report.changed();
    plots().forEach((p) => Plotly.relayout(p, {
      autosize: false, width: p.closest(".columns") ? PAPER / 2 - 12 : PAPER,
      height: p.classList.contains("tall") ? TALL : LOW,
    }));
  });
  window.addEventListener("afterprint", () => {
    if (!before) return;
    before.closed.forEach((d) => { d.open = false; });
    document.documentElement.dataset.theme = before.theme;
    report.changed();
    plots().forEach((p) => Plotly.relayout(p, { autosize: true, width: null, height: null }));
    before = null;
  });
})();
