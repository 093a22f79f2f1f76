"""The end of a sweep: one row per SAE in results.csv and results.parquet.

Needs nothing of saeray's to be read. No Ray.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.architectures import SPARSITY
from saeray.spec.config import NOT_AN_AXIS, LanguageModelSAERunnerConfig
from saeray.spec.stream import ROW_FIELDS
from saeray.spec.synthetic import is_synthetic

# Column -> wandb key. Held-out figures, except those of the training state; the losses are the last
# batch's. docs/metrics.md says what each of them is.
COLUMNS = {
    "l0": "eval/l0",
    "explained_variance": "eval/explained_variance",
    "explained_variance_per_token": "eval/explained_variance_per_token",
    "ce_loss_score": "eval/CE_loss_score",
    "ce_loss_without_sae": "eval/ce_loss_without_sae",
    "ce_loss_with_sae": "eval/ce_loss_with_sae",
    "ce_loss_with_ablation": "eval/ce_loss_with_ablation",
    "kl_div": "eval/kl_div_with_sae",
    # Fired on less than dead_feature_threshold of the tokens of the last full sampling window.
    "dead_features": "sparsity/below_dead_feature_threshold",
    "features_never_fired_held_out": "eval/features_never_fired",
    "mean_log10_feature_sparsity": "eval/mean_log10_feature_sparsity",
    "fvu": "eval/fvu",
    "cosine": "eval/cosine",
    "l2_ratio": "eval/l2_ratio",
    "relative_reconstruction_bias": "eval/relative_reconstruction_bias",
    "ce_loss_score_mean_ablation": "eval/CE_loss_score_mean_ablation",
    "kl_div_score": "eval/kl_div_score",
    "l1": "eval/l1",
    "dense_share": "eval/dense_share",
    "s_n_dec": "eval/s_n_dec",
    "mdl": "eval/mdl",
    "mse_loss": "losses/mse_loss",
    "l1_loss": "losses/l1_loss",
    "l0_loss": "losses/l0_loss",
    "n_training_tokens": "details/n_training_tokens",
}

# The same where the model is synthetic, and the features are known.
GROUND_TRUTH_COLUMNS = {
    "mcc": "ground_truth/mcc",
    "features_found": "ground_truth/features_found",
    "firing_precision": "ground_truth/firing_precision",
    "firing_recall": "ground_truth/firing_recall",
    "firing_f1": "ground_truth/firing_f1",
    "shrinkage": "ground_truth/shrinkage",
    "true_l0": "ground_truth/l0",
}


def result_row(
    name: str,
    config: LanguageModelSAERunnerConfig,
    axes: Sequence[str],
    status: str,
    path: str | None,
    metrics: dict[str, Any],
    error: str | None,
) -> dict[str, Any]:
    """One SAE's row: trial, status, path, the fields that vary, then the figures."""
    row: dict[str, Any] = {"trial": name, "status": status, "path": path}
    row.update({axis: in_a_cell(axis, getattr(config, axis)) for axis in axes})
    columns = COLUMNS | (GROUND_TRUTH_COLUMNS if is_synthetic(config.model_name) else {})
    row.update({column: metrics.get(key) for column, key in columns.items()})
    row["error"] = error
    return row


def in_a_cell(name: str, value: Any) -> Any:
    """A value of the config; what can be a list is text, since a column has one type."""
    if name not in ROW_FIELDS or value is None:
        return value
    return strict_json.dumps(value)


def varying_fields(configs: Sequence[LanguageModelSAERunnerConfig]) -> list[str]:
    """The fields in which the SAEs differ; what their sparsity comes from and lr in any case."""
    dicts = [c.to_dict() for c in configs]
    of_saes = [key for key in dicts[0] if key not in NOT_AN_AXIS]  # others may differ by session
    varying = [key for key in of_saes if any(d[key] != dicts[0][key] for d in dicts)]
    sparsity = [key for key in SPARSITY if dicts[0].get(key) is not None]
    return varying + [key for key in (*sparsity, "lr") if key not in varying]


def write_results(folder: Folder, rows: Sequence[dict[str, Any]]) -> None:
    """results.csv and results.parquet. Paths inside the folder are written as from there."""
    names = dict.fromkeys(name for row in rows for name in row)  # not all may have all
    rows = [
        dict.fromkeys(names) | row | {"path": path_from(folder, row.get("path"))} for row in rows
    ]
    write_table(folder, pa.Table.from_pylist(rows))


def path_from(folder: Folder, path: str | None) -> str | None:
    """A path as it is from the folder, where it lies inside: so the folder may be moved."""
    root, place = folder.parts[0].rstrip("/") + "/", path
    if place is not None and "://" in place:
        place = place.partition("?")[0]
    return place.removeprefix(root) if place is not None and place.startswith(root) else path


def path_in(folder: Folder, row: Mapping[str, Any]) -> str | None:
    """Where the SAE of a row of results.parquet is now, as a whole path or URI.

    Earlier versions wrote whole paths, of where the folder was then.
    """
    path = row.get("path")
    if not path:
        return None
    if "://" in path or path.startswith("/"):
        path = f"trials/{row['trial']}/final"
    return (folder / path).uri


def add_column(folder: Folder, name: str, values: Mapping[str, float | None]) -> None:
    """Results that are there with one column more (or anew), before the last; values by trial."""
    table = results_table(folder.read("results.parquet"))
    if name in table.column_names:
        table = table.drop_columns(name)
    column = pa.array([values.get(t) for t in table["trial"].to_pylist()], pa.float64())
    write_table(folder, table.add_column(table.num_columns - 1, name, column))


def results_table(data: bytes) -> pa.Table:
    """What results.parquet holds.

    Read in this thread alone: one of Arrow's that lets go of its last buffer while Python ends
    wants an interpreter that is no longer there, and aborts the process.
    """
    file = pyarrow.parquet.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(use_threads=False)


def write_table(folder: Folder, table: pa.Table) -> None:
    # A column no SAE has a value for (yet) has no type of its own.
    for i, column in enumerate(table.schema):
        if pa.types.is_null(column.type):
            kind = pa.string() if column.name in ("path", "error") else pa.float64()
            table = table.set_column(i, column.name, table.column(i).cast(kind))
    csv, parquet = io.BytesIO(), io.BytesIO()
    pyarrow.csv.write_csv(table, csv)
    pyarrow.parquet.write_table(table, parquet)
    folder.write("results.csv", csv.getvalue())
    folder.write("results.parquet", parquet.getvalue())
