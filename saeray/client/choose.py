"""`saeray best` and `saeray compare`: one SAE of a sweep, one frontier of several sweeps."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saeray.client.result import SweepResult, cell, dataframe, load_sweep, only
from saeray.client.speed import human
from saeray.errors import ConfigError, SaerayError, printable
from saeray.files import frontier, seeds, strict_json
from saeray.files.results import COLUMNS, varying_fields
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, ENDS, STOPPED

if TYPE_CHECKING:
    import pandas


def compare(*sweeps: str | os.PathLike[str]) -> pandas.DataFrame:
    """The SAEs of several sweeps in one data frame, as `SweepResult.dataframe` has one's.

    Beside its columns: `sweep`, every field in which any two of the SAEs differ, and frontiers over
    all of them together (of each model and hook point, where there are several). SAEs of sweeps
    that are not finished are in it as far as they are.

    Raises:
        ConfigError: no sweep is there.
    """
    return dataframe(rows_of([load_sweep(place) for place in sweeps]))


def rows_of(sweeps: Sequence[SweepResult]) -> list[dict[str, Any]]:
    """The rows of all of them, with the same columns."""
    names = Counter(sweep.name for sweep in sweeps)
    configs: list[LanguageModelSAERunnerConfig] = []
    found: list[tuple[str, SweepResult, dict[str, Any]]] = []
    for sweep in sweeps:
        of_sweep = SweepFolder(sweep.folder, sweep.name).read_configs()
        label = sweep.name if names[sweep.name] == 1 else sweep.folder.uri
        found += [(label, sweep, row) for row in sweep.rows]
        configs += [of_sweep[row["trial"]] for row in sweep.rows]
    # A hook point may be written in two ways.
    axes = [axis for axis in varying_fields(configs) if axis != "hook_point_layer"]
    if "hook_point" not in axes and len({c.resolved_hook_point for c in configs}) > 1:
        axes.append("hook_point")
    rows = []
    for (label, sweep, row), config in zip(found, configs, strict=True):
        values = {axis: getattr(config, axis) for axis in axes}
        if "hook_point" in values:
            values["hook_point"] = config.resolved_hook_point
        figures = {column: row.get(column) for column in (*COLUMNS, seeds.COLUMN)}
        ended = row["status"] in (DONE, STOPPED)
        rows.append(
            {"sweep": label, "trial": row["trial"], "status": row["status"]}
            | {"path": sweep.final(row).uri if ended else None}
            | values
            | figures
            | {"error": row["error"]}
        )
    return rows


def compare_command(arguments: argparse.Namespace) -> int:
    sweeps = [load_sweep(place) for place in arguments.sweeps]
    if len({sweep.folder.uri for sweep in sweeps}) < len(sweeps):
        raise ConfigError("a sweep stands in the comparison twice.")
    said: list[str] = []
    if arguments.stability:
        for sweep in sweeps:
            sweep.rows, left_out = seeds.add_stability(sweep.folder, sweep.rows)
            said += left_out
    rows = rows_of(sweeps)
    print(printable("\n".join([*compared(rows, arguments.all), *(f"! {text}" for text in said)])))
    return 0


def compared(rows: Sequence[dict[str, Any]], everything: bool = False) -> list[str]:
    """Lines: of every model and hook point, the SAEs on a frontier (or all), sparsest first.

    Raises:
        SaerayError: no SAE has finished.
    """
    judged = [r for r in rows if any(frontier.judged(r, by) for by in frontier.MARKS)]
    if not judged:
        raise SaerayError(frontier.nothing_judged(rows, "fvu"))
    marks = dict(zip(map(key, rows), frontier.marks(rows), strict=True))
    lines = [how_far(rows)]
    widths = [max(len(str(row[name])) for row in judged) for name in ("trial", "sweep")]
    for hook in dict.fromkeys(map(frontier.hook_of, judged)):
        here = [row for row in judged if frontier.hook_of(row) == hook]
        if len(here) < len(judged):
            lines += ["", " ".join(str(value) for value in hook if value is not None)]
        lines.append(
            f"{'SAE':<{widths[0]}}  {'sweep':<{widths[1]}}       L0     FVU  CE score   dead  "
            "PW-MCC  frontier"
        )
        for row in sorted(here, key=frontier.l0_of):
            if not (marks[key(row)] or everything):
                continue
            fvu, stability = frontier.figure(row, "fvu"), row[seeds.COLUMN]
            lines.append(
                f"{row['trial']:<{widths[0]}}  {row['sweep']:<{widths[1]}}  {row['l0']:>7.1f}  "
                f"{cell(fvu, '.4f'):>6}  {cell(row['ce_loss_score'], '.4f'):>8}  "
                f"{cell(row['dead_features'], '.0f'):>5}  {cell(stability, '.3f'):>6}  "
                f"{marks[key(row)]}".rstrip()
            )
        for mark in frontier.MARKS.values():
            on = Counter(row["sweep"] for row in here if mark in marks[key(row)].split())
            if on:
                shares = ", ".join(f"{n} of {sweep}" for sweep, n in on.most_common())
                lines.append(f"on the frontier of L0 and {mark}: {shares}")
    over_seeds = [f"{label:<40} {figures}" for label, figures in seeds.table(rows)]
    return [*lines, *over_seeds, *(f"! {text}" for text in frontier.cautions(rows))]


def key(row: frontier.Row) -> tuple[str, str]:
    return row["sweep"], row["trial"]


def how_far(rows: Sequence[frontier.Row]) -> str:
    """How many SAEs of each sweep have ended."""
    sweeps = dict.fromkeys(row["sweep"] for row in rows)
    of = {name: [row["status"] for row in rows if row["sweep"] == name] for name in sweeps}
    return ", ".join(
        f"{name}: {sum(s in (DONE, STOPPED) for s in states)} of {len(states)} SAEs"
        + ("" if all(s in ENDS for s in states) else " so far")
        for name, states in of.items()
    )


def best_command(arguments: argparse.Namespace) -> int:
    where = {}
    for text in arguments.where:
        name, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"--where {text!r}: FIELD=VALUE is wanted.")
        where[name] = value
    sweep = load_sweep(arguments.sweep)
    row = sweep.best(arguments.l0, arguments.by, arguments.within, **where)
    if arguments.json:
        print(strict_json.dumps(row | {"path": sweep.final(row).uri}))
        return 0
    config = SweepFolder(sweep.folder, sweep.name).read_configs()[row["trial"]]
    lines, judged = described(sweep, row, config), only(sweep.rows, where)
    print(printable("\n".join([*lines, *(f"! {text}" for text in frontier.cautions(judged))])))
    return 0


def described(
    sweep: SweepResult, row: dict[str, Any], config: LanguageModelSAERunnerConfig
) -> list[str]:
    """Lines: an SAE's name, figures, hyper-parameters, where it is and how it is loaded."""
    fvu, dead = frontier.figure(row, "fvu"), row["dead_features"]
    figures = [
        f"L0 {row['l0']:.1f}",
        f"FVU {cell(fvu, '.4f')}",
        f"CE score {cell(row['ce_loss_score'], '.4f')}",
        f"KL {cell(row['kl_div'], '.4f')} on held-out text",
        f"{cell(dead, '.0f')} dead features",
    ]
    if row.get(seeds.COLUMN) is not None:
        figures.append(f"PW-MCC {row[seeds.COLUMN]:.3f}")
    figures.append(f"{row['status']} after {human(row['n_training_tokens'])} tokens")
    fields = [name for name in row if name in seeds.CONFIG_FIELDS]
    fields += ["architecture", *varying_fields([config]), "recipe", "expansion_factor", "seed"]
    hyper = [
        f"{name} {seeds.shown(value)}"
        for name in dict.fromkeys(fields)
        if (value := getattr(config, name)) is not None
    ]
    path = sweep.final(row).uri
    return [
        row["trial"],
        f"  {' · '.join(figures)}",
        f"  {' · '.join(hyper)}",
        f"  at {' -> '.join(config.hooks_read)} of {config.model_name}",
        f"  {path}",
        f'  load it: saeray.load_sae("{path}")'
        + ("" if "://" in path else f', or in sae_lens SAE.load_from_disk("{path}")'),
    ]
