"""What a sweep has left behind: its rows, as a table, as a data frame, and the SAE to take.

`load_sweep` opens it from the sweep's folder, finished or not; it starts nothing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from saeray.client.live_table import fitted_names, in_the_middle
from saeray.client.speed import Times, account, human
from saeray.client.text_plot import plotted
from saeray.errors import ConfigError, SaerayError, nearest, printable
from saeray.files import frontier, seeds
from saeray.files.results import COLUMNS
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.messages import DONE, INTERRUPTED, KNOWN_ROWS, STOPPED, SweepStatus

if TYPE_CHECKING:
    import pandas

    from saeray.sae.architectures.base import SAE


@dataclass(repr=False)
class SweepResult:
    """What a sweep has left behind."""

    name: str
    folder: Folder
    rows: list[dict[str, Any]]  # results.csv, row by row
    status: SweepStatus
    times: Times | None = None

    def __repr__(self) -> str:
        """A line, not the rows: for notebooks and shells."""
        states = Counter(row["status"] for row in self.rows)
        counted = ", ".join(f"{n} {state}" for state, n in states.items())
        return f"<SweepResult {self.name}: {len(self.rows)} SAEs ({counted}) in {self.folder.uri}>"

    @property
    def ok(self) -> bool:
        """Whether every SAE finished, or was stopped by its scheduler."""
        return all(row["status"] in (DONE, STOPPED) for row in self.rows)

    def with_all_ended(self) -> SweepResult:
        """The same, Ray's own end included in its times."""
        if self.times is not None:
            self.times = self.times._replace(ended=time.time())
        return self

    def best(
        self, l0: float, by: str = "fvu", within: float = frontier.BAND, **where: Any
    ) -> dict[str, Any]:
        """The row of the SAE to take at an L0; `load` takes it.

        Of the finished SAEs that no sparser one beats in `by` (the frontier), the one whose L0 is
        nearest to `l0`, in ratio.

        Args:
            by: fvu, explained_variance, ce_loss_score, kl_div …: held-out figures.
            within: how far off its L0 may be: with 0.2, from l0 / 1.2 to l0 * 1.2.
            where: values of columns, for a part of the sweep: hook_point="blocks.2.hook_resid_pre".
                A sweep over several models or hook points wants one of them.

        Raises:
            ConfigError: a number that is not above 0, a `by` or a column that is not there.
            SaerayError: no finished SAE is there, or none near enough; says which are next to it.
        """
        rows = only(self.rows, where)
        return rows[frontier.best(rows, l0, by, within)]

    def dataframe(self) -> pandas.DataFrame:
        """results.csv as a data frame: a row per SAE.

        Beside its columns: fvu, and whether the SAE is on the frontier of L0 and fvu
        (`on_frontier_fvu`) and on that of L0 and CE loss score (`on_frontier_ce_loss_score`).
        """
        return dataframe(self.rows)

    def summary(self, width: int | None = None) -> str:
        """A table of the SAEs, the frontier, the account of tokens, and where everything is.

        width: of the terminal, for the table: names that are too long for it are shortened.
        """
        lines = table(self.rows, width)
        lines += plotted(self.rows)
        status = self.status
        one_pass = sum(status.pass_tokens)
        if one_pass and (status.harvested_tokens or status.cached_tokens):  # not all done already
            n_streams = len(status.pass_tokens)
            each = f" of each of {n_streams} streams" if n_streams > 1 else ""
            cached = f", {status.cached_tokens:,} read from cache" if status.cached_tokens else ""
            kind = status.rows_are
            unit = "rows" if kind == KNOWN_ROWS else "tokens"
            resampling = ""
            if status.resampling_tokens:
                resampling = f" Resampling: {human(status.resampling_tokens)} {unit}."
            lines.append(
                f"{kind[:1].upper()}{kind[1:]} harvested: {status.harvested_tokens:,}{cached}; one "
                f"SAE{each} trained on {one_pass:,} ({status.harvested_tokens / one_pass:.3f}x); "
                f"all SAEs together on {status.trained_tokens:,}. Evaluation: "
                f"{human(status.evaluation_tokens)} {unit}, held out.{resampling}"
            )
        lines += stopped_early(self.rows)
        if self.times is not None:
            lines += account(status, self.times)
        if self.times is not None and not any("no report.html" in w for w in status.warnings):
            lines.append(f"to look at: {(self.folder / 'report.html').uri}")
        lines += [f"! {warning}" for warning in status.warnings]
        if any(row["status"] == INTERRUPTED for row in self.rows):
            lines.append(f"interrupted SAEs go on with: saeray sweep --resume {self.folder.uri}")
        lines.append(f"results: {self.folder.uri}")
        return "\n".join(lines)

    def final(self, row: Mapping[str, Any] | str) -> Folder:
        """The folder of a trained SAE, of its row or its `trial`."""
        trial = row if isinstance(row, str) else row["trial"]
        return self.folder / "trials" / trial / "final"

    def load(self, row: Mapping[str, Any] | str) -> SAE:
        """The trained SAE of a row, or of its `trial`."""
        from saeray.files.checkpoint import load_sae

        return load_sae(self.final(row))


def stopped_early(rows: list[dict[str, Any]]) -> list[str]:
    """A line on the SAEs that a scheduler has ended before their last step."""
    tokens = [int(row["n_training_tokens"] or 0) for row in rows if row["status"] == STOPPED]
    if not tokens:
        return []
    return [
        f"stopped early by the scheduler: {len(tokens)} of {len(rows)} SAEs, after "
        f"{min(tokens):,} to {max(tokens):,} tokens each; they are saved and evaluated as they "
        "were then."
    ]


def load_sweep(folder: str | os.PathLike[str] | Folder) -> SweepResult:
    """The results of a sweep, finished or not, as its folder has them. Starts nothing.

    Its rows have every SAE that was planned; one that nothing is known of yet is `waiting`.

    Args:
        folder: its path or URI (s3://…, gs://…).

    Raises:
        ConfigError: no sweep is there, or its sweep.yaml is damaged.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(folder, "SWEEP")
    _, rows = SweepFolder(place, place.name).read_planned()
    return SweepResult(place.name, place, rows, SweepStatus([], "as its folder has it"))


def only(rows: list[dict[str, Any]], where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with these values; a text stands for the value that is written so.

    Raises:
        ConfigError: no such column. SaerayError: no such row.
    """
    for name, value in where.items():
        columns = {key for row in rows for key in row}
        if name not in columns:
            raise ConfigError(
                f"{name}: the SAEs do not differ in it, or there is no such column; "
                f"{nearest(name, columns)}"
            )
        kept = [row for row in rows if is_value(row.get(name), value)]
        if not kept:
            there = ", ".join(dict.fromkeys(str(row.get(name)) for row in rows))
            raise SaerayError(f"no SAE has {name} = {value}; there are: {there}.")
        rows = kept
    return rows


def is_value(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return value == float(wanted)
        except ValueError:
            return False
    return value == wanted or str(value) == wanted


KNOWN_FEATURES = {
    "MCC": ("mcc", 6, ".3f"),
    "found": ("features_found", 6, ".3f"),
    "F1": ("firing_f1", 6, ".3f"),
    "shrunk": ("shrinkage", 7, ".3f"),
}


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(rows: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """Lines: a row per SAE, marked where it is on a frontier; then the figures over seeds.

    width: of the terminal; names are shortened to fit into it. None: as long as they are.
    """
    columns = {"L0": ("l0", 7, ".1f"), "expl.var": ("explained_variance", 8, ".3f")}
    if any(row.get("mcc") is not None for row in rows):  # the features are known
        columns |= KNOWN_FEATURES
    else:
        columns["CE score"] = ("ce_loss_score", 8, ".3f")
    columns["dead"] = ("dead_features", 5, ".0f")
    if any(row.get(seeds.COLUMN) is not None for row in rows):
        columns["PW-MCC"] = (seeds.COLUMN, 6, ".3f")
    heads = " ".join(f"{title:>{w}}" for title, (_, w, _) in columns.items())
    marks = frontier.marks(rows)
    states = [row["status"] for row in rows]
    state = max(map(len, ["status", *states]))
    head, names = fitted(
        [printable(row["trial"]) for row in rows],
        None if width is None else width - state - len(heads) - len("    frontier"),
    )
    wide = max(cell_len(name) for name in (head, *names))
    lines = [f"{padded(head, wide)} {'status':<{state}} {heads}  frontier"]
    for row, name, mark in zip(rows, names, marks, strict=True):
        cells = [f"{cell(row.get(key), form):>{w}}" for key, w, form in columns.values()]
        line = f"{padded(name, wide)} {row['status']:<{state}} {' '.join(cells)}  {mark}"
        lines.append(line.rstrip())
        if row["error"]:
            lines.append(f"    {row['error']}")
    if any(marks):
        lines.append("frontier: no sparser SAE has a lower FVU (FVU), or a higher CE score (CE)")
    over_seeds = seeds.table(rows)
    if not over_seeds:
        return lines
    (head, *labels), figures = zip(*over_seeds, strict=True)
    room = None if width is None else width - 2 - max(map(len, figures))
    _, names = fitted(labels, room)
    if room is not None:
        head = in_the_middle(head, max([*map(cell_len, names), room]))
    wide = max(cell_len(name) for name in (head, *names))
    over = zip((head, *names), figures, strict=True)
    return lines + [f"{padded(name, wide)} {text}" for name, text in over]


def fitted(names: Sequence[str], width: int | None) -> tuple[str, list[str]]:
    """Names of at most `width` cells, but never of fewer than a dozen, and what heads them."""
    if width is None:
        return "SAE", list(names)
    return fitted_names(names, max(12, width))


def padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def dataframe(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Rows as a data frame, with fvu and the frontiers they are on."""
    import pandas

    frame = pandas.DataFrame(rows)
    frame["fvu"] = [frontier.figure(row, "fvu") for row in rows]
    for by in frontier.MARKS:
        frame[f"on_frontier_{by}"] = frontier.on_frontier(rows, by)
    figures = [c for c in (*COLUMNS, seeds.COLUMN, "fvu") if c in frame]
    return frame.astype(dict.fromkeys(figures, "float64"))
