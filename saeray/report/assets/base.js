/* What every page's script needs: its data, elements made of texts (never of HTML), numbers in
   words, light and dark, tables that sort. */
"use strict";

const saeray = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  /** An element; strings among its children are texts. Attributes that are null are left out. */
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat().filter((c) => c !== null && c !== undefined));
    return made;
  }

  /** A number in at most `digits` significant digits; – where there is none. */
  function short(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
    if (size >= 1e6 || size < 1e-4) {
      return value.toExponential(Math.min(2, digits - 1)).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return String(Number(value.toPrecision(digits)));
  }

  /** A name that may be broken after its commas, for an element's children. */
  const breakable = (name) =>
    String(name).split(",").flatMap((part, i, all) =>
      i + 1 < all.length ? [`${part},`, document.createElement("wbr")] : [part]);

  /** A share in percent. */
  const percent = (value, digits = 1) =>
    value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`;

  /** The value of a CSS variable, as it is now. */
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const watchers = [];
  /** Calls `draw` whenever light turns dark, or back. */
  const onTheme = (draw) => watchers.push(draw);

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    watchers.forEach((draw) => draw());
  }
  const wished = window.matchMedia("(prefers-color-scheme: dark)");
  let kept = null;
  try { kept = localStorage.getItem("saeray-theme"); } catch { /* none for files, in some browsers */ }
  setTheme(kept || (wished.matches ? "dark" : "light"));
  wished.addEventListener("change", () => setTheme(wished.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("saeray-theme", next); } catch { /* as above */ }
    setTheme(next);
  });

  /** Lets a table sort by the heads that have data-sort ("number" or "text"); a cell's value is
      its data-value, or its text. */
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const kind = head.dataset.sort;
      if (!kind) return;
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => {
          const cell = row.cells[column];
          const text = cell.dataset.value ?? cell.textContent.trim();
          if (kind !== "number") return text;
          return text === "" || text === "–" ? NaN : Number(text);
        };
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [value(row), row]);
        rows.sort(([a], [b]) => {
          if (kind !== "number") return down ? b.localeCompare(a) : a.localeCompare(b);
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return down ? b - a : a - b;
        });
        body.append(...rows.map(([, row]) => row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (e) => { if (e.key === "Enter") sort(); });
    });
  }

  return { data, el, short, percent, breakable, colour, onTheme, sortable };
})();
