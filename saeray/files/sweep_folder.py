"""A sweep's folder as a whole: what is written where, and how a later session reads it back.

    sweep.yaml                      what was asked for, every SAE's resolved config, versions
    results.csv  results.parquet    a row per SAE, with its state
    trials/<SAE>/metrics.jsonl      a line per report
    .ray/                           while it runs: Ray's own files, and the roster's memory

An SAE's state is what its row says; its newest figures are what its metrics.jsonl says. Nothing
else is needed to go on with a sweep. No Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from saeray.errors import ConfigError, nearest
from saeray.files import strict_json
from saeray.files.metrics_log import read_lines, with_names_of_now
from saeray.files.picture import write_pareto
from saeray.files.results import (
    COLUMNS,
    path_in,
    result_row,
    results_table,
    varying_fields,
    write_results,
)
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import ENDS, INTERRUPTED, WAITING

MEMORY = "roster.json"  # in .ray/
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is


# A sweep.yaml without these was written before there were any: it goes on as it began.
WHERE_NOT_GIVEN = {"recipe": "guide-2024", "text_version": 1, "compute_dtype": "float32"}


class Known(NamedTuple):
    """What the folder says of an SAE."""

    state: str  # an end, or `waiting`
    path: str | None
    error: str | None
    step: int  # of the newest line of its metrics.jsonl
    n_training_tokens: int
    metrics: dict[str, Any]  # the newest value of each
    evaluation_tokens: int


class Memory(NamedTuple):
    """A roster's, beside what the rest of the folder says."""

    saes: dict[str, dict[str, Any]]  # configs by name
    versions: dict[str, Any]
    warnings: list[str]
    # Tokens harvested and read from cache by each incarnation of a buffer.
    tokens: dict[str, tuple[int, int]]


class Outcome(NamedTuple):
    """One SAE, for its row."""

    name: str
    config: LanguageModelSAERunnerConfig
    state: str
    path: str | None
    metrics: dict[str, Any]
    error: str | None

    @property
    def steps(self) -> int:
        """Trained, as its newest figures say."""
        tokens = self.metrics.get("details/n_training_tokens", 0)
        return int(tokens) // self.config.train_batch_size


class SweepFolder:
    """Reads and writes the files of one sweep that concern all its SAEs."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder = folder
        self.name = name

    def write_sweep_yaml(
        self,
        configs: Mapping[str, LanguageModelSAERunnerConfig],
        versions: Mapping[str, Any],
        resources: Mapping[str, Any],
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """The resolved configs and what they were run with.

        asked: the fields of the sweep as they were given. None: those that are there stay.
        """
        asked = self.read_asked() if asked is None else asked
        data = {
            "name": self.name,
            **({"config": dict(asked)} if asked else {}),
            "versions": dict(versions),
            "resources": dict(resources),
            "saes": {name: config.to_dict() for name, config in configs.items()},
        }
        self.folder.write("sweep.yaml", yaml.safe_dump(data, sort_keys=False).encode())

    def read_sweep_yaml(self) -> dict[str, Any]:
        """What `write_sweep_yaml` wrote: name, versions, resources and, as data, every SAE.

        Raises:
            ConfigError: no sweep was begun there, or its sweep.yaml can't be read.
        """
        try:
            data = yaml.load(self.folder.read("sweep.yaml"), YAML_LOADER)
            return data | {"saes": dict(data["saes"])}
        except OSError:
            raise ConfigError(
                f"{self.folder.uri}: there is no sweep.yaml, so no sweep that could go on."
            ) from None
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.folder.uri}/sweep.yaml: damaged ({error}).") from None

    def read_asked(self) -> dict[str, Any]:
        """The fields that the sweep was asked for with; none where nobody wrote them down."""
        try:
            return dict(yaml.load(self.folder.read("sweep.yaml"), YAML_LOADER).get("config") or {})
        except (OSError, yaml.YAMLError, AttributeError):
            return {}

    def read_configs(self) -> dict[str, LanguageModelSAERunnerConfig]:
        """Every SAE's config, from sweep.yaml.

        The folder may have been moved: name and storage_path are those of where it is now.

        Raises:
            ConfigError: no sweep was begun there, or its sweep.yaml can't be read.
        """
        saes = self.read_sweep_yaml()["saes"]
        root = self.folder.parent_uri
        return {
            name: LanguageModelSAERunnerConfig.from_dict(
                WHERE_NOT_GIVEN | config | {"name": self.name, "storage_path": root},
                source=f"{self.folder.uri}/sweep.yaml: {name}",
            )
            for name, config in saes.items()
        }

    def write_results(self, outcomes: Sequence[Outcome]) -> None:
        """results.csv and results.parquet, and the frontier once all have ended."""
        axes = varying_fields([o.config for o in outcomes])
        rows = [
            result_row(o.name, o.config, axes, o.state, o.path, o.metrics, o.error)
            for o in outcomes
        ]
        write_results(self.folder, rows)
        if all(o.state in ENDS for o in outcomes):
            write_pareto(self.folder, rows, self.name)

    def read_rows(self) -> list[dict[str, Any]]:
        """results.parquet, row by row, with whole paths; none when nothing has ended yet."""
        if "results.parquet" not in self.folder.names():
            return []
        table = results_table(self.folder.read("results.parquet"))
        rows = [with_names_of_now(row) for row in table.to_pylist()]
        # An earlier version may not have all columns.
        return [
            row | {"path": path_in(self.folder, row)} | {c: None for c in COLUMNS if c not in row}
            for row in rows
        ]

    def read_planned(
        self,
    ) -> tuple[dict[str, LanguageModelSAERunnerConfig], list[dict[str, Any]]]:
        """The configs by name, and a row of each; one that nothing is known of yet is `waiting`.

        Raises:
            ConfigError: no sweep is there (names what may have been meant), or it can't be read.
        """
        place = self.folder
        try:
            if "sweep.yaml" not in place.names():
                raise ConfigError(
                    f"{place.uri}: there is no sweep.yaml, so no sweep.{beside(place)}"
                )
            configs = self.read_configs()
            found = {row["trial"]: row for row in self.read_rows()}
        except OSError as error:
            raise ConfigError(f"{place.uri}: can't be read: {error}") from None
        axes = varying_fields(list(configs.values()))
        return configs, [
            found.get(name) or result_row(name, config, axes, WAITING, None, {}, None)
            for name, config in configs.items()
        ]

    def known(self, names: Sequence[str]) -> dict[str, Known]:
        """What was reached of each SAE. Interrupted ones wait again."""
        rows = {row["trial"]: row for row in self.read_rows()}
        found = {}
        for name in names:
            row = rows.get(name, {})
            state = row.get("status")
            if state not in ENDS or state == INTERRUPTED:
                state = WAITING
            step, n_tokens, evaluated, metrics = 0, 0, 0, {}
            for line in read_lines(self.folder / "trials" / name):
                step = max(step, line.pop("step"))
                n_tokens = max(n_tokens, line.get("details/n_training_tokens", 0))
                evaluated += line.get("eval/n_tokens", 0)
                metrics.update(line)
            ended = state != WAITING
            found[name] = Known(
                state,
                row.get("path") if ended else None,
                row.get("error") if ended else None,
                step,
                n_tokens,
                metrics,
                evaluated,
            )
        return found

    def outcomes_but(self, names: Collection[str]) -> dict[str, Outcome]:
        """What earlier sessions have written down of all other SAEs, to be kept.

        Nobody is at work on one that had not ended: it was interrupted.

        Raises:
            ConfigError: sweep.yaml, which has their configs, is damaged or not there.
        """
        rows = {row["trial"]: row for row in self.read_rows() if row["trial"] not in names}
        if not rows:
            return {}
        configs = {name: c for name, c in self.read_configs().items() if name in rows}
        found = {}
        for name, known in self.known(list(configs)).items():
            row, config = rows[name], configs[name]
            state = INTERRUPTED if known.state == WAITING else known.state
            found[name] = Outcome(name, config, state, row["path"], known.metrics, row["error"])
        return found

    # --- while it runs ----------------------------------------------------------------------

    def remember(self, memory: Memory) -> None:
        """What a roster must know again when it is started again."""
        (self.folder / ".ray").write(MEMORY, strict_json.dumps(memory._asdict()).encode())

    def recall(self) -> Memory | None:
        """What `remember` wrote last; None when it never did."""
        folder = self.folder / ".ray"
        if MEMORY not in folder.names():
            return None
        return Memory(**strict_json.loads(folder.read(MEMORY)))


def beside(place: Folder) -> str:
    """What may have been meant: sweeps in the folder, or names beside it that are like its own."""
    inside = [name for name in place.names() if (place / name / "sweep.yaml").exists()]
    if inside:
        return f" Sweeps in it: {', '.join(inside[:12])}."
    if "/" not in place.path.strip("/"):  # a bucket
        return ""
    names = Folder.at(place.parent_uri).names()
    return f" Beside it: {nearest(place.name, names)}" if names else ""
