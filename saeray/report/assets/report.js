/* What is looked at: which SAEs, in which colours and shapes; what charts and tables share. */
"use strict";

const report = (() => {
  const { data, el, short, colour } = saeray;
  const saes = data.saes.map((sae, index) => {
    const curves = Object.fromEntries(
      Object.entries(sae.curves.of).map(([key, [x, y]]) => [key, [sae.curves.tokens[x], y]]),
    );
    return { ...sae, index, curves };
  });
  const state = { hook: data.hooks[0], filters: {}, colour: null, shape: null };
  const byId = (id) => document.getElementById(id);

  /* --- axes: the fields that differ, and a few that stand for several --- */

  const unique = (values) => [...new Set(values)];
  function axis(key, label, value) {
    const values = unique(saes.map(value)).filter((v) => v !== null && v !== undefined);
    const numeric = values.every((v) => typeof v === "number" || v === "–");
    values.sort((a, b) => (a === "–") - (b === "–") || (numeric ? a - b : String(a).localeCompare(b)));
    return { key, label, value, values, numeric };
  }
  const axes = data.axes.map((key) => axis(key, key, (sae) => sae.values[key]));
  const width = axis("d_sae", "width (d_sae)", (sae) => sae.d_sae);
  const factor = axes.find((a) => a.key === "expansion_factor");
  if (width.values.length > (factor ? factor.values.length : 1)) axes.push(width);
  if (data.sweeps.length > 1) axes.push(axis("sweep", "sweep", (sae) => data.sweeps[sae.sweep]));
  const axisOf = (key) => axes.find((a) => a.key === key) || null;
  const varying = axes.filter((a) => a.values.length > 1);
  const first = (...keys) => keys.find((key) => varying.some((a) => a.key === key));

  state.colour = first("lr") || first("sweep", "architecture", "recipe", "seed") || null;
  state.shape =
    ["architecture", "d_sae", "expansion_factor", "sweep", "recipe"].find(
      (key) => key !== state.colour && varying.some((a) => a.key === key),
    ) || null;

  const visible = () =>
    saes.filter(
      (sae) =>
        sae.hook === state.hook &&
        Object.entries(state.filters).every(([k, v]) => String(axisOf(k).value(sae)) === v),
    );

  /* --- colours and shapes --- */

  const RAMP = ["#4d63d6", "#2089bd", "#1f9d82", "#7fa62c", "#d9902a", "#cf5135"];
  const NAMED = ["#3566b0", "#d07a1f", "#2f9467", "#b5467f", "#7a5fc0", "#8a6d3b", "#4a9fb5", "#c24a3f"];
  const SHAPES = [
    ["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"],
    ["cross", "✚"], ["triangle-down", "▼"], ["star", "★"], ["hexagon", "⬢"],
  ];
  const MANY = 8; // values: of more a legend has a ramp

  function mixed(t) {
    const at = Math.min(RAMP.length - 1.0001, Math.max(0, t * (RAMP.length - 1)));
    const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [a, b] = [parts(RAMP[Math.floor(at)]), parts(RAMP[Math.floor(at) + 1])];
    const f = at - Math.floor(at);
    return `rgb(${a.map((v, i) => Math.round(v + f * (b[i] - v))).join(" ")})`.replaceAll(" ", ",");
  }
  function shade(a, value) {
    const place = a.values.indexOf(value);
    if (!a.numeric) return NAMED[place % NAMED.length];
    return a.values.length < 2 ? RAMP[0] : mixed(place / (a.values.length - 1));
  }
  function colourOf(sae) {
    const a = axisOf(state.colour);
    return a ? shade(a, a.value(sae)) : colour("--accent");
  }
  function shapeOf(sae) {
    const a = axisOf(state.shape);
    const [shape] = SHAPES[a ? Math.max(0, a.values.indexOf(a.value(sae))) % SHAPES.length : 0];
    return sae.ended ? shape : `${shape}-open`;
  }

  function legend() {
    const parts = [];
    const a = axisOf(state.colour);
    if (a && a.values.length > 1) {
      const entries =
        a.numeric && a.values.length > MANY
          ? [
              el("span", {}, short(a.values[0])),
              el("span", { class: "ramp", style: `background: linear-gradient(90deg, ${RAMP.join(", ")})` }),
              el("span", {}, short(a.values.filter((v) => v !== "–").at(-1))),
            ]
          : a.values.map((v) =>
              el("span", {}, el("i", { style: `color: ${shade(a, v)}` }, "●"), ` ${short(v)}`),
            );
      parts.push(el("div", {}, el("b", {}, a.label), ...entries));
    }
    const s = axisOf(state.shape);
    if (s && s.values.length > 1) {
      const entries = s.values.map((v, i) =>
        el("span", {}, el("i", {}, SHAPES[i % SHAPES.length][1]), ` ${short(v)}`),
      );
      parts.push(el("div", {}, el("b", {}, s.label), ...entries));
    }
    byId("legend").replaceChildren(...parts);
  }

  /* --- the frontier --- */

  const LESS_IS_BETTER = new Set(["fvu", "kl_div"]);
  const better = (figure, a, b) => (LESS_IS_BETTER.has(figure) ? a < b : a > b);

  /** Of finished SAEs those that no other one is both sparser than and better than. */
  function frontier(among, figure) {
    const at = (sae) => sae.figures[figure];
    const judged = among.filter((s) => ["done", "stopped"].includes(s.status) && s.figures.l0 !== null && at(s) !== null);
    return judged
      .filter(
        (s) =>
          !judged.some(
            (o) =>
              o.figures.l0 <= s.figures.l0 && !better(figure, at(s), at(o)) &&
              (o.figures.l0 < s.figures.l0 || better(figure, at(o), at(s))),
          ),
      )
      .sort((a, b) => a.figures.l0 - b.figures.l0);
  }
  const onAny = (among) => new Set(data.frontiers.flatMap((by) => frontier(among, by)));

  /* --- the words beside the pointer --- */

  const tip = byId("tip");
  function showTip(sae, event, extra = []) {
    const rows = [...extra];
    for (const a of axes) rows.push([a.label, a.value(sae)]);
    for (const f of ["l0", ...data.frontiers]) rows.push([data.figures[f], sae.figures[f]]);
    const state = sae.ended ? sae.status : `${sae.status}: ${short(sae.tokens)} of ${short(sae.planned)} tokens`;
    tip.replaceChildren(
      el("b", {}, saeray.breakable(sae.label)),
      el("dl", {}, rows.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, short(v))])),
      el("span", { class: "muted" }, `${state} · click for more`),
    );
    tip.hidden = false;
    const [x, y] = [event?.clientX ?? 40, event?.clientY ?? 40];
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 16, window.innerWidth - box.width - 8))}px`;
    const below = y + 16 + box.height < window.innerHeight;
    tip.style.top = `${Math.max(4, below ? y + 16 : y - 16 - box.height)}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  window.addEventListener("scroll", hideTip, { passive: true });

  /* --- controls --- */

  const drawers = [];
  /** Calls `draw` now, while the page is idle, and whenever what is looked at changes. */
  const onChange = (draw) => drawers.push(draw);
  const changed = () => { hideTip(); legend(); drawers.forEach((draw) => draw()); };

  function fill(select, options, value) {
    select.replaceChildren(...options.map(([v, label]) => el("option", { value: v }, label)));
    select.value = value ?? "";
  }
  /** Buttons of which one is pressed; `chosen` is told which. */
  function switchOf(place, options, value, chosen) {
    const buttons = options.map(([v, label]) =>
      el("button", { type: "button", "data-value": v, "aria-pressed": String(v === value) }, label),
    );
    buttons.forEach((button) =>
      button.addEventListener("click", () => {
        buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
        chosen(button.dataset.value);
      }),
    );
    place.replaceChildren(...buttons);
  }

  function controls() {
    const made = [];
    const picker = (name, label, options, value, chosen) => {
      const select = el("select", { "data-filter": name, onchange: () => chosen(select.value) });
      fill(select, options, value);
      made.push(el("label", {}, label, select));
    };
    if (data.hooks.length > 1) {
      picker("hook", "hook point", data.hooks.map((h) => [h, h]), state.hook, (v) => {
        state.hook = v;
        changed();
      });
    }
    for (const a of varying) {
      if (a.values.length > 24 || a.key === "hook_point") continue;
      picker(a.key, a.label, [["", "all"], ...a.values.map((v) => [String(v), short(v)])], "", (v) => {
        if (v === "") delete state.filters[a.key];
        else state.filters[a.key] = v;
        changed();
      });
    }
    if (made.length) made.unshift(el("span", { class: "muted" }, "Show"));
    made.push(el("span", { class: "muted", id: "how-many" }));
    byId("filters").replaceChildren(...made);
    onChange(() => {
      const n = visible().length;
      byId("how-many").textContent = n === saes.length ? "" : `${n} of ${saes.length} SAEs`;
    });

    const none = [["", "–"]];
    const named = (list) => list.map((a) => [a.key, a.label]);
    fill(byId("colour-by"), [...none, ...named(varying)], state.colour);
    const few = varying.filter((a) => a.values.length <= SHAPES.length);
    if (state.shape && !few.some((a) => a.key === state.shape)) state.shape = null;
    fill(byId("shape-by"), [...none, ...named(few)], state.shape);
    for (const [id, what] of [["colour-by", "colour"], ["shape-by", "shape"]]) {
      byId(id).addEventListener("change", () => { state[what] = byId(id).value || null; changed(); });
    }
  }
  controls();

  return {
    saes, state, axes, varying, axisOf, visible, byId, colourOf, shapeOf, frontier, onAny,
    showTip, hideTip, onChange, changed, fill, switchOf, better, LESS_IS_BETTER, drawers, legend,
  };
})();
