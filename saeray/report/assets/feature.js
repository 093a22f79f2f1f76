/* One feature: its figures, and its contexts with what it reads shaded. The number stands behind #. */
"use strict";

(() => {
  const { data, el, short, percent } = saeray;
  const AROUND = [24, 12]; // tokens shown before and after the peak
  const at = (id) => document.getElementById(id);
  const files = new Map(); // first feature of a file -> its features
  let text = null; // {texts, context, rows: window -> its place, ids}
  let whole = false;
  let now = -1;

  window.saerayTokens = (found) => {
    const bytes = Uint8Array.from(atob(found.windows), (c) => c.charCodeAt(0));
    const ids = new Uint32Array(bytes.buffer); // little-endian, as every machine with a browser
    text = { ...found, ids, rows: new Map(found.numbers.map((w, i) => [w, i])) };
  };
  window.saerayFeatures = (found) => files.set(found.first, found.features);

  /** Loads a data file, which calls one of the two above. */
  function load(name) {
    return new Promise((done, failed) => {
      const node = el("script", { src: `data/${name}`, onload: done, onerror: () => failed(new Error(name)) });
      document.head.append(node);
    });
  }

  async function feature(j) {
    const first = j - (j % data.per_file);
    if (!text) await load("tokens.js");
    const number = String(first / data.per_file).padStart(5, "0");
    if (!files.has(first)) await load(`features-${number}.js`);
    return files.get(first)[j - first];
  }

  /** A token's text, with its line breaks where they can be seen. */
  function pieces(token) {
    return token.split(/(\n|\t)/).filter((t) => t !== "").map((t) =>
      t === "\n" ? el("span", { class: "break" }, "↵") : t === "\t" ? el("span", { class: "break" }, "⇥") : t);
  }

  const tokensOf = (window_) => {
    const from = text.rows.get(window_) * text.context;
    return Array.from(text.ids.subarray(from, from + text.context), (i) => text.texts[i]);
  };

  function contextLine([window_, position, peak, active], largest) {
    const values = new Map();
    for (let i = 0; i < active.length; i += 2) values.set(active[i], active[i + 1]);
    const tokens = tokensOf(window_);
    const line = el("div", { class: "words" });
    let open = whole;
    const fill = () => {
      const from = open ? 0 : Math.max(0, position - AROUND[0]);
      const to = open ? tokens.length : Math.min(tokens.length, position + AROUND[1] + 1);
      const made = tokens.slice(from, to).map((token, i) => {
        const value = values.get(from + i);
        if (value === undefined) return el("span", {}, pieces(token));
        const share = Math.min(1, value / largest);
        return el("span", {
          class: from + i === position ? "on peak" : "on",
          style: `background: rgb(var(--mark) / ${(8 + 77 * share).toFixed(0)}%)`,
          title: `${short(value, 4)} at token ${from + i}`,
        }, pieces(token));
      });
      line.replaceChildren(from > 0 ? "… " : "", ...made, to < tokens.length ? " …" : "");
    };
    fill();
    const held = window_ < data.held_out ? el("small", {}, "held out") : null;
    return el("div", { class: "text", onclick: () => { open = !open; fill(); } },
      el("div", { class: "value" }, short(peak, 4), held), line);
  }

  /** Bars of counts, which begin at `low` and are `width` wide; each says what it is of. */
  function bars(place, { counts, low, width }) {
    place.replaceChildren();
    if (!counts.length) { place.append(el("p", { class: "note" }, "none")); return; }
    const NS = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${counts.length} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "bars");
    svg.setAttribute("role", "img");
    const most = Math.max(...counts);
    counts.forEach((count, i) => {
      // By the square root: a feature fires weakly far more often than strongly.
      const height = 96 * Math.sqrt(count / most);
      const rect = document.createElementNS(NS, "rect");
      for (const [name, value] of Object.entries({ x: i + 0.08, y: 100 - height, width: 0.84, height })) {
        rect.setAttribute(name, value);
      }
      const title = document.createElementNS(NS, "title");
      title.textContent = `${short(low + i * width, 3)} to ${short(low + (i + 1) * width, 3)}: ${count.toLocaleString("en")}`;
      rect.append(title);
      svg.append(rect);
    });
    place.append(svg, el("div", { class: "axis" }, el("span", {}, short(low, 3)),
      el("span", {}, "heights: √count"), el("span", {}, short(low + counts.length * width, 3))));
  }

  const effectTable = (title, list) => el("div", {}, el("h3", {}, title),
    el("table", {}, el("tbody", {}, list.map(([token, logit]) => el("tr", {},
      el("td", {}, el("span", { class: "token" }, pieces(token.replace(/^ | $/g, "␣")))),
      el("td", { class: "num" }, short(logit, 3)))))));

  const link = (j, ...children) => el("a", { href: `#${j}` }, ...children);

  function show(j, f) {
    at("number").textContent = String(j);
    document.title = `feature ${j} · ${document.title.split(" · ").pop()}`;
    const kind = f.fired === 0 ? "never fired" : f.density > data.dense ? "dense" : null;
    at("badge").replaceChildren(kind ? el("span", { class: "badge warn small" }, kind) : "");
    const figure = (value, name) => el("div", {}, el("b", {}, value), el("span", {}, name));
    at("figures").replaceChildren(
      figure(percent(f.density, 4), "density: share of tokens"),
      figure(f.fired.toLocaleString("en"), `of ${data.n_tokens.toLocaleString("en")} tokens`),
      figure(short(f.largest, 4), "largest activation"),
      figure(short(f.norm, 4), "norm of the decoder row"));
    bars(at("histogram"), f.histogram);
    at("logit-side").hidden = !data.has_logits;
    at("effects").hidden = !data.has_logits;
    if (data.has_logits) {
      bars(at("logits"), f.logits);
      at("effects").replaceChildren(effectTable("raises", f.top_logits), effectTable("lowers", f.bottom_logits));
    }
    at("near").replaceChildren(...f.near.flatMap(([k, cosine]) => [link(k, String(k)), ` ${short(cosine, 3)}  `]));
    const parts = [el("h3", {}, `top ${f.top.length}`), ...f.top.map((c) => contextLine(c, f.largest))];
    for (const band of f.bands) {
      if (!band.contexts.length) continue;
      parts.push(el("h3", {}, `activation ${short(band.low, 3)} to ${short(band.high, 3)} `,
        el("span", { class: "muted" }, `(${band.tokens.toLocaleString("en")} token${band.tokens === 1 ? "" : "s"})`)));
      parts.push(...band.contexts.map((c) => contextLine(c, f.largest)));
    }
    if (f.fired === 0) parts.splice(0, parts.length, el("p", { class: "note" }, "It fired on none of the tokens."));
    at("contexts").replaceChildren(...parts);
  }

  async function open() {
    const wanted = Number(location.hash.slice(1) || 0);
    const j = Number.isInteger(wanted) ? Math.min(Math.max(wanted, 0), data.n_features - 1) : 0;
    now = j;
    at("goto").value = j;
    at("before").disabled = j === 0;
    at("after").disabled = j === data.n_features - 1;
    at("status").textContent = "";
    try {
      const f = await feature(j);
      if (now !== j) return;
      show(j, f);
    } catch (error) {
      at("status").textContent = `data/${error.message} is not there: copy the whole folder.`;
    }
    document.documentElement.dataset.ready = String(j);
  }

  const go = (j) => { location.hash = String(j); };
  at("before").addEventListener("click", () => go(now - 1));
  at("after").addEventListener("click", () => go(now + 1));
  at("goto").max = data.n_features - 1;
  at("goto").addEventListener("change", (e) => go(Number(e.target.value)));
  at("whole").addEventListener("click", (e) => {
    whole = !whole;
    e.target.setAttribute("aria-pressed", String(whole));
    open();
  });
  document.addEventListener("keydown", (e) => {
    if (e.target.tagName === "INPUT") return;
    if (e.key === "ArrowLeft" && now > 0) go(now - 1);
    if (e.key === "ArrowRight" && now < data.n_features - 1) go(now + 1);
  });
  window.addEventListener("hashchange", open);
  open();
})();
