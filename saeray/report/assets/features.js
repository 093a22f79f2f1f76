/* The index of an SAE's features: search, filter, sort; rows are made as they are asked for. */
"use strict";

(() => {
  const { data, el, short } = saeray;
  const AT_ONCE = 200;
  const at = (id) => document.getElementById(id);
  const n = data.density.length;
  const lower = data.texts.map((text) => text.toLowerCase());
  const has = (column, found, j) => column.length > 0 && column[j].some((t) => found.has(t));
  let order = [];
  let shown = 0;

  const tokens = (column, j) =>
    (column.length ? column[j] : []).slice(0, 5).map((t) => el("span", { class: "token" }, visible(data.texts[t])));

  /** Spaces at the ends and line breaks, where they can be seen. */
  function visible(text) {
    return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
  }

  function keeps() {
    const word = at("find").value.toLowerCase().replace(/␣/g, " ");
    const number = /^#?\d+$/.test(word.trim()) ? Number(word.trim().replace("#", "")) : null;
    const found = new Set();
    if (word) lower.forEach((text, t) => { if (text.includes(word)) found.add(t); });
    const where = at("where").value;
    const columns = where === "any" ? [data.peaks, data.top, data.bottom] : [data[where]];
    const which = at("which").value;
    return (j) => {
      if (which === "alive" && data.density[j] === 0) return false;
      if (which === "dead" && data.density[j] > 0) return false;
      if (which === "dense" && data.density[j] <= data.dense) return false;
      return !word || j === number || columns.some((column) => has(column, found, j));
    };
  }

  const orders = {
    largest: (a, b) => data.largest[b] - data.largest[a] || a - b,
    density: (a, b) => data.density[b] - data.density[a] || a - b,
    rare: (a, b) => data.density[a] - data.density[b] || a - b,
    number: (a, b) => a - b,
  };

  function row(j) {
    const href = `feature.html#${j}`;
    const badge = data.density[j] === 0 ? "never fired" : data.density[j] > data.dense ? "dense" : null;
    return el("tr", { class: "link", onclick: (e) => { if (e.target.tagName !== "A") location.href = href; } },
      el("td", { class: "num" }, el("a", { href }, String(j))),
      el("td", { class: "num" }, badge ? el("span", { class: "badge warn" }, badge) : null, " ", short(data.density[j], 3)),
      el("td", { class: "num" }, short(data.largest[j], 4)),
      el("td", {}, tokens(data.peaks, j)), el("td", {}, tokens(data.top, j)), el("td", {}, tokens(data.bottom, j)));
  }

  function more() {
    at("rows").append(...order.slice(shown, shown + AT_ONCE).map(row));
    shown = Math.min(order.length, shown + AT_ONCE);
    at("count").textContent = `${order.length.toLocaleString("en")} of ${n.toLocaleString("en")}`;
    at("more").hidden = shown >= order.length;
  }

  function again() {
    order = [...Array(n).keys()].filter(keeps()).sort(orders[at("by").value]);
    shown = 0;
    at("rows").replaceChildren();
    more();
  }

  at("find").addEventListener("input", again);
  for (const id of ["where", "which", "by"]) at(id).addEventListener("change", again);
  at("more").addEventListener("click", more);
  again();
  document.documentElement.dataset.ready = "yes";
})();
