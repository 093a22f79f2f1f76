"""Pages of an SAE's features: an index to search, and a page that shows one feature.

    <sweep>/features/index.html              the SAEs
    <sweep>/features/<SAE>/index.html        every feature, by density, largest activation, tokens
    <sweep>/features/<SAE>/feature.html#12   one of them
    <sweep>/features/<SAE>/data/             what that page reads: the text, and `PER_FILE` features
                                             at a time

They open from disk, without a server: data are scripts, since a page may load no other file of a
disk. Texts travel as JSON strings and are put on the page as texts.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from saeray.files import feature_data, strict_json
from saeray.files.feature_data import DENSE, Context, FeatureData
from saeray.files.storage import Folder
from saeray.report.page import render

PER_FILE = 64  # features of one data file
INDEXED = 10  # tokens of a list that can be searched for
STYLES = ("features.css",)


def write_pages(folder: Folder) -> int:
    """The pages of an SAE whose features are in its folder; bytes written."""
    data = feature_data.read(folder)
    files = {"tokens.js": tokens_file(data)}
    for first in range(0, len(data), PER_FILE):
        files[name_of(first)] = features_file(data, first)
    pages = {"index.html": index_page(data), "feature.html": feature_page(data)}
    for name, content in files.items():
        (folder / "data").write(name, content)
    for name, content in pages.items():
        folder.write(name, content)
    return sum(map(len, [*files.values(), *pages.values()]))


def write_list(sweep: Folder) -> None:
    """features/index.html of a sweep: a row per SAE whose features are there."""
    rows = []
    for name, folder in feature_data.folders(sweep):
        about = feature_data.read_about(folder) or {}
        rows.append({"name": name, **{k: about.get(k) for k in SHOWN_OF_SAES}})
    page = render("features_list.html", {}, STYLES, sweep=sweep.name, rows=rows)
    (sweep / feature_data.PLACE).write("index.html", page)


SHOWN_OF_SAES = ("hook_point", "d_sae", "n_dead", "n_dense", "n_tokens")


def name_of(feature: int) -> str:
    """The data file that a feature is in."""
    return f"features-{feature // PER_FILE:05d}.js"


def script(call: str, data: Any) -> bytes:
    """A script that hands data to a function of the page's."""
    text = strict_json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return f"{call}({text});\n".encode()


# --- data ---------------------------------------------------------------------------------------


def tokens_file(data: FeatureData) -> bytes:
    """Texts of tokens, and every window that a context is of, as base64 of little-endian uint32."""
    windows = data.used_windows()
    ids = np.unique(data.tokens[windows]) if len(windows) else np.zeros(0, np.int32)
    index = np.searchsorted(ids, data.tokens[windows]).astype("<u4")
    return script(
        "saerayTokens",
        {
            "texts": [data.text(int(i)) for i in ids],
            "context": int(data.tokens.shape[1]),
            "numbers": windows.tolist(),
            "windows": base64.b64encode(index.tobytes()).decode(),
        },
    )


def features_file(data: FeatureData, first: int) -> bytes:
    features = [one(data, j) for j in range(first, min(first + PER_FILE, len(data)))]
    return script("saerayFeatures", {"first": first, "features": features})


def one(data: FeatureData, feature: int) -> dict[str, Any]:
    """What the page of a feature shows."""
    a = data.arrays
    fired = int(a["histogram"][feature].sum())
    shown: dict[str, Any] = {
        "density": fired / data.n_tokens,
        "fired": fired,
        "largest": significant(a["largest"][feature]),
        "norm": significant(a["decoder_norm"][feature]),
        "histogram": histogram(a["histogram"][feature], float(a["bin_width"][feature])),
        "top": [context(c) for c in data.top(feature)],
        "bands": [
            {
                "low": significant(b.low),
                "high": significant(b.high),
                "tokens": b.tokens,
                "contexts": [context(c) for c in b.contexts],
            }
            for b in data.bands(feature)
        ],
        "near": [[j, round(cosine, 4)] for j, cosine in data.neighbours(feature)],
    }
    if data.has_logits:
        for which in ("top", "bottom"):
            effects = data.effects(feature, which)
            shown[f"{which}_logits"] = [[data.text(e.token), significant(e.logit)] for e in effects]
        low, high = a["logit_range"][feature]
        counts = a["logit_histogram"][feature]
        width = (float(high) - float(low)) / len(counts)
        shown["logits"] = {"counts": counts.tolist(), "low": significant(low), "width": width}
    return shown


def context(c: Context) -> list[Any]:
    """[window, position of the peak, peak, [position, activation, …]]."""
    pairs = zip(c.positions.tolist(), c.values.tolist(), strict=True)
    active = [x for position, value in pairs for x in (position, significant(value))]
    return [c.window, c.position, significant(c.peak), active]


def histogram(counts: np.ndarray, width: float) -> dict[str, Any]:
    """Without the empty bins at the end."""
    used = np.flatnonzero(counts)
    n = int(used[-1]) + 1 if len(used) else 0
    return {"counts": counts[:n].tolist(), "low": 0.0, "width": width}


def significant(value: Any, digits: int = 5) -> float:
    """A number as short as that many digits allow."""
    return float(f"{float(value):.{digits}g}")


# --- pages --------------------------------------------------------------------------------------


def index_page(data: FeatureData) -> bytes:
    a, density = data.arrays, data.density
    texts: dict[str, int] = {}

    def numbered(tokens: Iterable[int]) -> list[int]:
        of = [data.text(t) for t in tokens]
        return [texts.setdefault(text, len(texts)) for text in dict.fromkeys(of)]

    peaks = []
    for j in range(len(data)):
        there = a["window"][j, : data.about["top"]] >= 0
        at = data.tokens[a["window"][j, : len(there)][there], a["position"][j, : len(there)][there]]
        peaks.append(numbered(at.tolist())[:INDEXED])
    logits = [
        [numbered(e.token for e in data.effects(j, which))[:INDEXED] for j in range(len(data))]
        for which in ("top", "bottom")
        if data.has_logits
    ]
    columns = {
        "density": [significant(d, 4) for d in density],
        "largest": [significant(v, 4) for v in a["largest"]],
        "peaks": peaks,
        "top": logits[0] if logits else [],
        "bottom": logits[1] if logits else [],
        "texts": list(texts),
        "dense": DENSE,
    }
    return render(
        "features.html", columns, STYLES, ("features.js",), about=data.about, facts=facts(data)
    )


def feature_page(data: FeatureData) -> bytes:
    known = {
        "n_features": len(data),
        "per_file": PER_FILE,
        "n_tokens": data.n_tokens,
        "dense": DENSE,
        "held_out": data.about["held_out_windows"],
        "has_logits": data.has_logits,
    }
    return render(
        "feature.html", known, STYLES, ("feature.js",), about=data.about, facts=facts(data)
    )


def facts(data: FeatureData) -> list[tuple[str, str]]:
    """What stands at a page's head, name and value."""
    about, fired = data.about, data.fired
    read = f"{data.n_tokens:,} of {about['dataset_path']}"
    held = about["held_out_windows"] / max(1, about["windows"])
    read += f", {held:.0%} of them held out" if held < 1 else ", all of them held out"
    dense = int((data.density > DENSE).sum())
    return [
        ("model", about["model_name"]),
        ("hook point", about["hook_point"]),
        ("features", f"{len(data):,}"),
        ("never fired", f"{int((fired == 0).sum()):,}"),
        ("dense", f"{dense:,} on more than {DENSE:.0%} of the tokens"),
        ("tokens", read),
        ("active per token", f"{math.fsum(data.density):.4g}"),
        ("logits", about["logits"]),
    ]
