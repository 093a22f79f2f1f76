"""results.csv, results.parquet and the frontier."""

import csv
import io

import pyarrow.parquet
from support.configs import short_run

from saeray.files.picture import frontiers, joined, write_pareto
from saeray.files.results import result_row, varying_fields, write_results
from saeray.files.storage import Folder
from saeray.spec.grid import expand


def test_results_have_a_row_per_sae_and_a_column_per_varying_field(tmp_path):
    configs = [short_run(lr=lr, seed=s) for lr in (1e-3, 2e-3) for s in (1, 2)]
    axes = varying_fields(configs)
    assert {"lr", "seed", "l1_coefficient"} <= set(axes)
    assert "model_name" not in axes
    figures = {
        "eval/l0": 12.5,
        "eval/CE_loss_score": 0.9,
        "eval/explained_variance": 0.8,
        "eval/explained_variance_per_token": 0.7,
        "sparsity/below_dead_feature_threshold": 3,
        "eval/features_never_fired": 17,
        "details/n_training_tokens": 80,
    }
    rows = [
        result_row(f"t{i}", c, axes, "done", f"p{i}", figures, None) for i, c in enumerate(configs)
    ]
    rows[3] = result_row("t3", configs[3], axes, "failed", None, {}, "the loss is nan")
    folder = Folder.at(tmp_path)
    write_results(folder, rows)
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [r["trial"] for r in read] == ["t0", "t1", "t2", "t3"]
    assert (read[0]["explained_variance"], read[0]["explained_variance_per_token"]) == (
        "0.8",
        "0.7",
    )
    assert (read[0]["dead_features"], read[0]["features_never_fired_held_out"]) == ("3", "17")
    assert (float(read[0]["l0"]), float(read[0]["lr"])) == (12.5, 1e-3)
    assert (read[3]["status"], read[3]["error"], read[3]["l0"]) == ("failed", "the loss is nan", "")
    assert pyarrow.parquet.read_table(tmp_path / "results.parquet").num_rows == 4
    rows[2]["ce_loss_score"] = None  # where a hook does not reach the logits
    write_pareto(folder, rows, "title")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_each_panel_of_the_frontier_has_the_saes_with_its_figure(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    set_ylabel = Axes.set_ylabel

    def noted(panel, label):
        drawn[label.split(",")[0].split(" (")[0]] = [list(line.get_ydata()) for line in panel.lines]
        return set_ylabel(panel, label)

    monkeypatch.setattr(Axes, "set_ylabel", noted)
    point = dict(lr=1e-3, l1_coefficient=1e-3, explained_variance_per_token=0.1)
    rows = [
        point | dict(l0=10.0, ce_loss_score=None, explained_variance=0.5),
        point | dict(l0=20.0, ce_loss_score=0.9, explained_variance=0.6),
        point | dict(l0=30.0, ce_loss_score=0.95, explained_variance=float("nan")),
    ]
    write_pareto(Folder.at(tmp_path), rows, "title")
    assert drawn == {"CE loss score": [[0.9, 0.95]], "explained variance": [[0.5, 0.6]]}


def test_a_line_of_the_picture_joins_saes_that_differ_in_their_sparsity_alone():
    def row(l1, l0, cv, **axes):
        return dict(l1_coefficient=l1, l0=l0, explained_variance=cv, status="done", **axes)

    rows = [
        row(l1, l0, 0.5, lr=lr, seed=seed, hook_point=f"blocks.{layer}.h", hook_point_layer=layer)
        for l1, l0 in ((1e-3, 20.0), (2e-3, 10.0))
        for lr in (1e-3, 2e-3)
        for seed in (1, 2)
        for layer in (0, 1)
    ]
    lines = joined(rows)
    assert len(lines) == 8
    assert all([r["l1_coefficient"] for r in line] == [1e-3, 2e-3] for line in lines.values())
    # The layer follows from the hook point, so it tells no more lines apart.
    assert "blocks.0.h lr 0.001 seed 1" in lines
    assert list(joined([row(1e-3, 20.0, 0.5, lr=1e-3)])) == ["lr 0.001"]

    # 10 and 20 on each hook point's frontier; 25 is worse in both than 20, 5 failed.
    here = [
        row(4e-3, 10.0, 0.4), row(2e-3, 20.0, 0.6), row(1e-3, 25.0, 0.55),
        row(8e-3, 5.0, 0.3) | {"status": "failed"}, row(2e-3, 99.0, 0.1, hook_point="other"),
    ]  # fmt: skip
    assert [[r["l0"] for r in on] for on in frontiers(here, "explained_variance")] == [
        [10.0, 20.0],
        [99.0],
    ]


def test_a_column_of_lists_is_text(tmp_path):
    given = [dict(context_slice=[1, 5]), dict(exclude_special_tokens=[[0, "<pad>"], True])]
    configs = [s.config for s in expand(short_run(grid=[*given, dict(lr=[1e-3])]))]
    axes = varying_fields(configs)
    rows = [result_row(f"t{i}", c, axes, "done", None, {}, None) for i, c in enumerate(configs)]
    write_results(Folder.at(tmp_path), rows)
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [r["context_slice"] for r in read] == ["[1, 5]", "", "", ""]
    assert [r["exclude_special_tokens"] for r in read] == ["false", '[0, "<pad>"]', "true", "false"]
