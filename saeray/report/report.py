"""report.html: what a sweep, or several, came to, as one file to look at.

The frontier first; then what to take, and how it came about. Reads folders only.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any
from urllib.parse import quote

from saeray.errors import printable
from saeray.files import frontier, seeds
from saeray.files.results import COLUMNS, GROUND_TRUTH_COLUMNS, varying_fields
from saeray.files.storage import Folder
from saeray.report.costs import costs_of
from saeray.report.gather import SweepData, place_from, read_sweep
from saeray.report.page import render
from saeray.spec.architectures import SPARSITY
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fields import all_fields
from saeray.spec.messages import DONE, ENDS, FAILED, INTERRUPTED, WAITING

FILE = "report.html"
FRONTIERS = ("ce_loss_score", "fvu", "kl_div")

# Figures with the words of the page, in its order; others keep their column's name.
LABELS = {
    "l0": "L0",
    "fvu": "FVU",
    "ce_loss_score": "CE loss score",
    "kl_div": "KL divergence",
    "explained_variance": "explained variance",
    "mcc": "MCC",
    "features_found": "features found",
    "firing_f1": "F1 of firing",
    "dead_share": "dead",
    "never_fired_share": "never fired, held out",
    "dense_share": "dense",
    "pw_mcc": "PW-MCC",
    "cosine": "cosine",
    "l2_ratio": "L2 ratio",
    "relative_reconstruction_bias": "reconstruction bias",
    "explained_variance_per_token": "expl. var. per token",
    "ce_loss_without_sae": "CE without the SAE",
    "ce_loss_with_sae": "CE with the SAE",
    "ce_loss_with_ablation": "CE zero-ablated",
    "ce_loss_score_mean_ablation": "CE score, mean-ablated",
    "kl_div_score": "KL score",
    "mdl": "MDL (bits per token)",
    "s_n_dec": "s_n of the decoder",
    "mean_log10_feature_sparsity": "mean log10 density",
    "l1": "L1 of the latents",
    "mse_loss": "MSE loss",
    "l1_loss": "L1 loss",
    "l0_loss": "L0 loss",
}
IN_TABLE = tuple(LABELS)[:12]  # of all SAEs; the others are with each of them
# Fields that are likely to be axes, in the order of a page.
ASKED_FOR = (
    "architecture", "recipe", *SPARSITY, "lr", "expansion_factor", "seed", "hook_point",
    "hook_point_out", "model_name", "dataset_path", "context_size", "train_batch_size",
    "training_tokens",
)  # fmt: skip
# Share of an SAE's features -> the column that counts them.
SHARES = {
    "dead_share": "dead_features",
    "never_fired_share": "features_never_fired_held_out",
}


def write_report(folders: Sequence[Folder], target: Folder, name: str = FILE) -> int:
    """Writes the page of these sweeps as `name` in the folder `target`; its size in bytes.

    Raises:
        ConfigError: no sweep is there. SaerayError: what is there is damaged.
        OSError: it can't be read, or the page not be written.
    """
    sweeps = [read_sweep(folder, len(folders)) for folder in folders]
    page = page_of(sweeps, target)
    target.write(name, page)
    return len(page)


def page_of(sweeps: Sequence[SweepData], target: Folder) -> bytes:
    """The page, for a place in the folder `target`."""
    labels = told_apart([sweep.folder.uri for sweep in sweeps])
    configs = [config for sweep in sweeps for config in sweep.configs.values()]
    axes = axes_of(configs)
    rows = [
        comparable(row, label, s) for s, label in zip(sweeps, labels, strict=True) for row in s.rows
    ]
    saes = saes_of(sweeps, rows, axes, target)
    figures = [f for f in LABELS if any(s["figures"].get(f) is not None for s in saes)]
    others = dict.fromkeys(f for s in saes for f in s["figures"] if f not in LABELS)
    figures += [f for f in others if any(s["figures"].get(f) is not None for s in saes)]
    hooks = list(dict.fromkeys(s["hook"] for s in saes))
    edges = next((log.edges for s in sweeps for log in s.logs.values() if log.edges), None)
    states = Counter(row["status"] for row in rows)
    shared = common(configs)
    data = {
        "sweeps": labels,
        "uris": [s.folder.uri for s in sweeps],
        "hooks": hooks,
        "axes": axes,
        "figures": {f: LABELS.get(f, f.replace("_", " ")) for f in figures},
        "frontiers": [f for f in (*FRONTIERS, "mcc") if f in figures],
        "edges": edges,
        "common": shared,
        "saes": saes,
    }
    return render(
        "report.html",
        data,
        styles=["report.css"],
        scripts=["plotly-basic.min.js", "report.js", "charts.js", "tables.js"],
        title=" · ".join(labels),
        sweeps=list(zip(labels, sweeps, strict=True)),
        several=len(sweeps) > 1,
        over=all(s.over for s in sweeps),
        states=states,
        hooks=hooks,
        saes=saes,
        axes=axes,
        shown=[f for f in figures if f in IN_TABLE],
        labels=LABELS,
        marks=frontier.marks(rows),
        cautions=frontier.cautions(judged_on(configs)),
        groups=seed_groups(rows, axes),
        ends_badly=[s for s in saes if s["error"] or s["status"] in (FAILED, INTERRUPTED)],
        costs=[(label, costs_of(s)) for label, s in zip(labels, sweeps, strict=True)],
        fields=described_fields(shared),
        written=time.strftime("%Y-%m-%d %H:%M"),
        number=number,
    )


def told_apart(uris: Sequence[str]) -> list[str]:
    """The last parts of each, as many as it takes for all to differ."""
    parts = [uri.partition("?")[0].rstrip("/").split("/") for uri in uris]
    for n in range(1, max(map(len, parts))):
        labels = ["/".join(p[-n:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(uris)


def axes_of(configs: Sequence[LanguageModelSAERunnerConfig]) -> list[str]:
    """The fields that SAEs are told apart by, those that are most asked for first.

    Of the others that differ, what another one of them decides (all of an architecture have the
    same) is left out: it would stand beside it as an axis of its own.
    """
    axes = [axis for axis in varying_fields(configs) if axis != "hook_point_layer"]
    if "hook_point" not in axes and len({c.resolved_hook_point for c in configs}) > 1:
        axes.append("hook_point")
    first = [axis for axis in ASKED_FOR if axis in axes]
    values = {axis: [str(value_of(c, axis)) for c in configs] for axis in axes}
    kept = [axis for axis in first if axis != "recipe"]  # mostly the architecture's
    for axis in axes:
        if axis not in kept and not any(decides(values[by], values[axis]) for by in kept):
            kept.append(axis)
    return kept


def decides(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether equal values in one mean equal values in the other."""
    return len(set(zip(one, other, strict=True))) == len(set(one))


def comparable(row: Mapping[str, Any], sweep: str, of: SweepData) -> dict[str, Any]:
    """A row that says what others of its page may not have in common with it."""
    config = of.configs[row["trial"]]
    hook = {name: getattr(config, name, None) for name in frontier.HOOK_FIELDS}
    hook |= {"hook_point": config.resolved_hook_point, "hook_point_layer": None}
    return {**row, **hook, "sweep": sweep, "fvu": frontier.figure(row, "fvu")}


def judged_on(configs: Sequence[LanguageModelSAERunnerConfig]) -> list[dict[str, Any]]:
    """Of each SAE, what text it was judged on."""
    return [
        {name: getattr(config, name, None) for name in frontier.TEXT_FIELDS} for config in configs
    ]


def saes_of(
    sweeps: Sequence[SweepData],
    rows: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    target: Folder,
) -> list[dict[str, Any]]:
    """Of each SAE, what scripts and tables need; rows are those of the sweeps, in their order."""
    shared = common([c for s in sweeps for c in s.configs.values()])
    flags = {by: frontier.on_frontier(rows, by) for by in FRONTIERS}
    named = Counter(row["trial"] for row in rows)
    found: list[dict[str, Any]] = []
    for i, sweep in enumerate(sweeps):
        place = place_from(sweep.folder, target)
        for row in sweep.rows:
            n = len(found)
            name, log = row["trial"], sweep.logs[row["trial"]]
            config = sweep.configs[name]
            data = config.to_dict()
            here = None if place is None else f"{place}/"
            final = f"trials/{name}/final"
            page = f"features/{name}/index.html"
            d_sae = sweep.d_sae(name)
            figures = {c: finite(rows[n].get(c)) for c in (*figure_columns(), seeds.COLUMN)}
            for share, column in SHARES.items():
                counted = figures.pop(column)
                figures[share] = None if counted is None or not d_sae else counted / d_sae
            tokens = int(row.get("n_training_tokens") or 0)
            status = row["status"]
            if status == WAITING and log.n_lines:
                status = "unfinished"
            found.append(
                {
                    "name": name,
                    "label": name if named[name] == 1 else f"{name} ({sweep.name})",
                    "sweep": i,
                    "hook": hook_label(rows[n]),
                    "status": status,
                    "ended": status in ENDS,
                    "judged": any(frontier.judged(rows[n], by) for by in (*FRONTIERS, "mcc")),
                    "error": printable(str(row["error"])) if row["error"] else None,
                    "tokens": tokens,
                    "planned": config.training_tokens,
                    "d_sae": d_sae,
                    "values": {a: value_of(config, a) for a in axes},
                    "figures": figures,
                    "on": [by for by in FRONTIERS if flags[by][n]],
                    "density": log.counts,
                    "curves": short_curves(log.curves),
                    "fields": {k: v for k, v in data.items() if k not in shared},
                    "final": None if here is None or status != DONE else quote(here + final) + "/",
                    "features": quote(here + page) if here and name in sweep.pages else None,
                }
            )
    return found


def figure_columns() -> tuple[str, ...]:
    left_out = ("n_training_tokens", "true_l0")
    return tuple(c for c in (*COLUMNS, *GROUND_TRUTH_COLUMNS) if c not in left_out)


def finite(value: Any) -> float | None:
    """A number as a page shows it, with as many digits as anybody reads."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def short_curves(curves: Mapping[str, tuple[list[int], list[float]]]) -> dict[str, Any]:
    """The figures of a log: `tokens`, lists that figures share, and `of`, by wandb key: the number
    of its list and its values. What never changes, or is there once, is left out."""
    tokens: list[list[int]] = []
    found: dict[str, tuple[int, list[float | None]]] = {}
    for key, (xs, ys) in curves.items():
        if len(set(ys)) < 2 or key in NO_CURVE:
            continue
        if xs not in tokens:
            tokens.append(xs)
        short = [None if not math.isfinite(y) else float(f"{y:.4g}") for y in ys]
        found[key] = (tokens.index(xs), short)
    return {"tokens": tokens, "of": found}


NO_CURVE = ("details/n_training_tokens", "details/training_seconds", "eval/n_tokens")


def value_of(config: LanguageModelSAERunnerConfig, axis: str) -> Any:
    """A field as a page groups by it: a number, or text."""
    value = config.resolved_hook_point if axis == "hook_point" else getattr(config, axis)
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return value
    return "–" if value is None else str(value)


def hook_label(row: Mapping[str, Any]) -> str:
    """The model and the hook point, in words."""
    values = [row.get(name) for name in frontier.HOOK_FIELDS]
    return " · ".join(str(v) for v in values if v is not None)


def common(configs: Sequence[LanguageModelSAERunnerConfig]) -> dict[str, Any]:
    """The fields that all SAEs have alike."""
    dicts = [c.to_dict() for c in configs]
    return {k: v for k, v in dicts[0].items() if all(d.get(k) == v for d in dicts)}


def described_fields(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each with its meaning, and whether it is other than where it is not given."""
    words = {f.name: f.words for f in all_fields()}
    plain = {
        f.name: f.default for f in fields(LanguageModelSAERunnerConfig) if f.default is not MISSING
    }
    return [
        {
            "name": name,
            "value": "–" if value is None else str(value),
            "words": words.get(name, ""),
            "given": value is not None and value != plain.get(name, MISSING),
        }
        for name, value in values.items()
    ]


def seed_groups(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """SAEs that differ in their seeds alone: figures over them."""
    known = ("l0", "fvu", "ce_loss_score", "kl_div", seeds.COLUMN)
    alike = [
        a for a in axes if a not in seeds.SEED_FIELDS and len({str(r.get(a)) for r in rows}) > 1
    ]
    found = []
    for group in seeds.seed_groups(rows):
        one = group.rows[0]
        words = [f"{a}={seeds.shown(one[a])}" for a in alike if one.get(a) is not None]
        label = ",".join(words) or "all SAEs"
        figures = {name: group.over_seeds(name) for name in known}
        found.append({"label": label, "n": len(group.rows)} | figures)
    return found


def number(value: Any, digits: int = 4) -> str:
    """A figure in a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
