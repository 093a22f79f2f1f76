"""What a report is made of, read from a sweep's folder, whether the sweep has ended or not.

Logs may be long: of every SAE only some lines are read as JSON, evenly spaced, with those that have
an evaluation and the last. So a log costs its bytes once and no more memory than what is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from saeray.files import account, strict_json
from saeray.files.metrics_log import line_of
from saeray.files.results import COLUMNS, GROUND_TRUTH_COLUMNS
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, ENDS, STOPPED
from saeray.spec.metric_names import of_batch

READERS = 8  # logs at a time: they may be far away
MOST_NUMBERS = 200_000  # of all training curves together: about 1.5 MB of a page
FEWEST, MOST = 25, 400  # points of a curve
CURVES = 24  # figures that an SAE has curves of, about
HISTOGRAM = "plots/feature_density_line_chart"
EVALUATED = '"eval/n_tokens"'  # in a line with an evaluation


class Log(NamedTuple):
    """An SAE's log as far as it is drawn."""

    curves: dict[str, tuple[list[int], list[float]]]  # by wandb key: tokens, values
    newest: dict[str, Any]  # of each key
    counts: list[int] | None  # the newest density histogram
    edges: list[float] | None
    n_lines: int


class SweepData(NamedTuple):
    """One sweep."""

    name: str
    folder: Folder
    configs: dict[str, LanguageModelSAERunnerConfig]
    rows: list[dict[str, Any]]  # of every SAE; of those that go on, with the newest figures
    logs: dict[str, Log]
    versions: Mapping[str, Any]
    resources: Mapping[str, Any]
    sessions: list[account.Session]
    pages: frozenset[str]  # SAEs with feature pages
    widths: Mapping[str, int]  # d_in by hook point, where anything tells it

    @property
    def over(self) -> bool:
        return all(row["status"] in ENDS for row in self.rows)

    def d_sae(self, name: str) -> int | None:
        """The width of an SAE."""
        config, counts = self.configs[name], self.logs[name].counts
        d_in = self.widths.get(config.resolved_hook_point)
        if d_in is not None:
            return config.d_sae(d_in)
        return sum(counts) if counts else None  # but for those that fire on every token


def read_sweep(folder: Folder, of: int = 1) -> SweepData:
    """Reads one of `of` sweeps that a page shows.

    Raises:
        ConfigError: no sweep is there, or its sweep.yaml is damaged. SaerayError: its account is.
    """
    files = SweepFolder(folder, folder.name)
    configs, rows = files.read_planned()
    began = files.read_sweep_yaml()
    each = MOST_NUMBERS * 2 // (3 * CURVES * max(1, len(configs) * of))
    points = min(MOST, max(FEWEST, each))
    with ThreadPoolExecutor(READERS) as pool:
        logs = dict(
            zip(
                configs,
                pool.map(lambda name: read_log(folder / "trials" / name, points), configs),
                strict=True,
            )
        )
    return SweepData(
        name=folder.name,
        folder=folder,
        configs=configs,
        rows=[with_newest(row, logs[row["trial"]].newest) for row in rows],
        logs=logs,
        versions=began.get("versions") or {},
        resources=began.get("resources") or {},
        sessions=account.read_sessions(folder),
        pages=feature_pages(folder),
        widths=widths_of(folder, configs, rows),
    )


def widths_of(
    folder: Folder,
    configs: Mapping[str, LanguageModelSAERunnerConfig],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, int]:
    """d_in by hook point: as given, or as one SAE there that has finished says."""
    found: dict[str, int] = {}
    for row in rows:
        config = configs[row["trial"]]
        hook_point = config.resolved_hook_point
        if hook_point in found:
            continue
        if config.d_in is not None:
            found[hook_point] = config.d_in
        elif row["status"] in (DONE, STOPPED):
            try:
                said = (folder / "trials" / row["trial"] / "final").read("cfg.json")
                found[hook_point] = int(strict_json.loads(said)["d_in"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it was moved away, and the results were kept
    return found


def with_newest(row: dict[str, Any], newest: Mapping[str, Any]) -> dict[str, Any]:
    """Of an SAE that goes on, the row with what its log says; others as they are."""
    if row["status"] in ENDS:
        return row
    figures = COLUMNS | GROUND_TRUTH_COLUMNS
    known = {c: newest.get(key, newest.get(of_batch(key))) for c, key in figures.items()}
    return row | {c: value for c, value in known.items() if value is not None}


def feature_pages(folder: Folder) -> frozenset[str]:
    """The SAEs that have features/<SAE>/index.html."""
    if "features" not in folder.names():
        return frozenset()
    return frozenset(
        name.removesuffix("/index.html")
        for name in (folder / "features").files()
        if name.endswith("/index.html")
    )


def read_log(folder: Folder, points: int) -> Log:
    """Of the SAE with this folder, with curves of about that many points at most."""
    if "metrics.jsonl" not in folder.names():
        return Log({}, {}, None, None, 0)
    texts = folder.read("metrics.jsonl").decode(errors="replace").splitlines()
    evaluated = [i for i, text in enumerate(texts) if EVALUATED in text]
    wanted = {*spaced(range(len(texts)), points), *spaced(evaluated, points // 2)}
    lines = [line for i in sorted(wanted) if (line := line_of(texts[i])) is not None]
    newest: dict[str, Any] = {}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        newest |= line
        tokens = line.get("details/n_training_tokens")
        for key, value in line.items():
            if key == "step" or not isinstance(value, (int, float)) or tokens is None:
                continue
            xs, ys = curves.setdefault(key, ([], []))
            xs.append(tokens)
            ys.append(value)
    histogram = newest.get(HISTOGRAM) or {}
    return Log(curves, newest, histogram.get("counts"), histogram.get("edges"), len(texts))


def spaced(of: Sequence[int], points: int) -> Iterable[int]:
    """At most that many of them, evenly spaced, the first and the last among them."""
    if len(of) <= points:
        return of
    return (of[round(i * (len(of) - 1) / (points - 1))] for i in range(points))


def place_from(folder: Folder, page: Folder) -> str | None:
    """Where a folder is, as a page that lies in another one may link to it; None: it may not.

    Local ones by a relative path, so both may be moved together. A browser opens no s3://.
    """
    if not (folder.is_local and page.is_local):
        same = folder.uri == page.uri
        return "." if same else None
    return Path(os.path.relpath(folder.path, page.path)).as_posix()
