"""SAEs that differ only in their seed: mean and interval by hand, stability in the results."""

import csv
import io
import math

import pytest
import torch
from support.finished import finished, sae

from saeray.files import seeds
from saeray.files.results import add_column
from saeray.files.sweep_folder import SweepFolder

# A dictionary, the same in another order with a sign changed, and one with half of it.
FIRST = torch.eye(8, 16)
SAME = -FIRST.flip(0)
HALF = torch.cat([torch.eye(16)[4:8], torch.eye(16)[8:12]])


def sweep(folder, **more):
    return finished(
        folder,
        a1=sae(10.0, 0.80, 0.9, W_dec=FIRST, seed=1, lr=1e-3),
        a2=sae(12.0, 0.82, 0.8, W_dec=SAME, seed=2, lr=1e-3),
        a3=sae(14.0, 0.84, None, W_dec=HALF, seed=3, lr=1e-3),
        b1=sae(20.0, 0.9, 0.95, W_dec=FIRST, seed=1, lr=2e-3),
        b2=sae(20.0, 0.9, 0.95, state="stopped", W_dec=FIRST, seed=2, lr=2e-3),
        **more,
    )


def rows_of(folder):
    return SweepFolder(folder, folder.name).read_rows()


def test_a_mean_has_a_95_percent_interval():
    # Of 10, 12, 14: standard deviation 2, t = 4.303 with 2 degrees of freedom.
    assert seeds.interval([10.0, 12.0, 14.0]) == (12.0, pytest.approx(4.303 * 2 / math.sqrt(3)))
    assert seeds.interval([7.0]) == (7.0, None)
    # Tables: t is 2.080 with 21 degrees of freedom, 2.042 with 30, 1.984 with 100.
    assert [round(seeds.t_975(n), 3) for n in (1, 20, 21, 30, 100)] == [
        12.706, 2.086, 2.08, 2.042, 1.984,
    ]  # fmt: skip


def test_groups_are_finished_saes_alike_in_all_but_their_seed(tmp_path):
    (group,) = seeds.seed_groups(rows_of(sweep(tmp_path / "s")))
    assert [row["trial"] for row in group.rows] == ["a1", "a2", "a3"]
    assert group.label == "lr=0.001,l1_coefficient=0.001"
    assert group.over_seeds("ce_loss_score").mean == pytest.approx(0.85)  # of the two that have it
    assert group.over_seeds("pw_mcc") is None


def test_a_sweep_of_one_seed_has_no_groups_and_its_results_stay_as_they_are(tmp_path):
    folder = finished(tmp_path / "s", a=sae(10.0, 0.8, lr=1e-3), b=sae(20.0, 0.9, lr=2e-3))
    before = folder.read("results.parquet")
    rows = rows_of(folder)
    assert seeds.add_stability(folder, rows) == (rows, [])
    assert seeds.table(rows) == []
    assert folder.read("results.parquet") == before


def test_stability_is_a_column_of_the_results(tmp_path):
    folder = sweep(tmp_path / "s")
    rows, left_out = seeds.add_stability(folder, rows_of(folder))
    assert left_out == []
    # a1 and a2 are the same; a3 has half of their features: pairs of 1, 1/2 and 1/2.
    wanted = {"a1": 0.75, "a2": 0.75, "a3": 0.5, "b1": None, "b2": None}
    assert {r["trial"]: r["pw_mcc"] for r in rows} == pytest.approx(wanted)
    assert rows_of(folder) == rows
    read = list(csv.DictReader(io.StringIO(folder.read("results.csv").decode())))
    assert [r["pw_mcc"] for r in read] == ["0.75", "0.75", "0.5", "", ""]
    assert list(read[0])[-2:] == ["pw_mcc", "error"]
    # What is there is not computed again, and is the same however often.
    before = folder.read("results.parquet")
    assert seeds.stability(folder, rows) == ({}, [])
    assert folder.read("results.parquet") == before
    (_, (label, figures)) = seeds.table(rows)
    assert label == "lr=0.001,l1_coefficient=0.001"
    assert "12.0 ± 5.0" in figures
    assert figures.endswith(" 0.667")  # (1 + 1/2 + 1/2) / 3 pairs


def test_a_sweep_that_still_runs_is_not_written_to(tmp_path):
    folder = sweep(tmp_path / "s", c=sae(state="training", seed=1, lr=3e-3))
    before = folder.read("results.parquet")
    rows, _ = seeds.add_stability(folder, rows_of(folder))
    assert [r["pw_mcc"] for r in rows[:3]] == pytest.approx([0.75, 0.75, 0.5])
    assert folder.read("results.parquet") == before


def test_a_column_is_replaced_by_its_new_values(tmp_path):
    folder = sweep(tmp_path / "s")
    add_column(folder, "pw_mcc", {"a1": 0.1})
    add_column(folder, "pw_mcc", {"a2": 0.2})
    assert [r["pw_mcc"] for r in rows_of(folder)] == [None, 0.2, None, None, None]


def test_what_takes_too_long_is_left_for_later(tmp_path):
    folder = sweep(tmp_path / "s")
    rows, (said,) = seeds.add_stability(folder, rows_of(folder), most_seconds=0.0)
    assert "pw_mcc" not in rows[0]
    assert f"saeray compare --stability {folder.uri}" in said


def test_weights_that_cannot_be_matched_are_named(tmp_path):
    folder = sweep(tmp_path / "s")
    final = folder / "trials" / "a2" / "final"
    whole = final.read("sae_weights.safetensors")
    final.write("sae_weights.safetensors", whole[:-8])
    values, (said,) = seeds.stability(folder, rows_of(folder))
    assert values == {} and "lr=0.001" in said and "a2/final/sae_weights.safetensors" in said
    final.write("sae_weights.safetensors", b"{}")
    values, (said,) = seeds.stability(folder, rows_of(folder))
    assert values == {} and "a2/final/sae_weights.safetensors" in said
    final.delete()
    values, (said,) = seeds.stability(folder, rows_of(folder))
    assert values == {} and "no PW-MCC" in said
