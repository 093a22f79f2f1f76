"""Choosing among finished SAEs: from Python, as pandas, and `saeray best` and `compare`."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.finished import finished, sae

import saeray
from saeray.client.cli import main
from saeray.client.result import table
from saeray.errors import ConfigError, SaerayError
from saeray.files.results import results_table
from saeray.files.storage import Folder


@pytest.fixture
def one(tmp_path):
    """Three SAEs on the frontier, one that `mid` beats, one that did not finish."""
    return finished(
        tmp_path / "one",
        low=sae(10.0, 0.7, 0.80, l1_coefficient=4e-3),
        mid=sae(48.0, 0.9, 0.90, l1_coefficient=1e-3, W_dec=torch.ones(8, 4)),
        worse=sae(50.0, 0.8, 0.85, l1_coefficient=1e-3, lr=1e-2),
        high=sae(90.0, 0.95, None, l1_coefficient=1e-4),
        gone=sae(49.0, 0.99, 0.99, state="interrupted", l1_coefficient=2e-3),
    )


@pytest.fixture
def other(tmp_path):
    """A sweep that still runs."""
    return finished(
        tmp_path / "other",
        wide=sae(40.0, 0.92, 0.85, expansion_factor=8),
        later=sae(state="training", expansion_factor=16),
    )


def test_the_best_sae_at_an_l0_is_a_row_that_loads(one):
    result = saeray.load_sweep(one.path)
    row = result.best(l0=50)
    assert (row["trial"], row["l0"]) == ("mid", 48.0)
    assert torch.equal(result.load(row).W_dec, torch.ones(8, 4))
    assert torch.equal(result.load("mid").W_dec, torch.ones(8, 4))
    assert result.best(l0=50, lr=1e-2)["trial"] == "worse"
    assert result.best(l0=80, within=1.0, by="ce_loss_score")["trial"] == "mid"
    assert not result.ok  # one was interrupted
    with pytest.raises(SaerayError, match=r"no SAE has lr = 3; there are: 0.0003, 0.01"):
        result.best(l0=50, lr=3)
    with pytest.raises(ConfigError, match=r"do not differ in it.*did you mean l1_coefficient"):
        result.best(l0=50, l1_coeficient=1)


def test_results_as_pandas(one):
    frame = saeray.load_sweep(one.path).dataframe()
    assert list(frame["trial"]) == ["low", "mid", "worse", "high", "gone"]
    assert list(frame["on_frontier_fvu"]) == [True, True, False, True, False]
    assert list(frame["on_frontier_ce_loss_score"]) == [True, True, False, False, False]
    assert frame["fvu"].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.05, 0.01])
    assert frame["ce_loss_score"].dtype == "float64"
    assert math.isnan(frame["ce_loss_score"][3])
    assert frame["mse_loss"].dtype == "float64"  # of which no SAE has any


def test_a_summary_marks_the_frontier(one):
    lines = saeray.load_sweep(one.path).summary().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("  FVU CE")] == ["low", "mid"]
    assert [line.split()[0] for line in lines if line.endswith("  FVU")] == ["high"]
    assert lines[0].endswith("dead  frontier")
    assert max(map(len, lines[:6])) <= 100


def test_a_summary_fits_the_terminal(tmp_path):
    """At 80 columns; a file has whole names, which lead to the SAEs."""
    base = "lr=0.0002,l1_coefficient=0.000{},expansion_factor=16,seed={}"
    of = {
        base.format(i, seed): sae(
            10.0 * i, 0.6 + 0.1 * i, 0.9, l1_coefficient=1e-4 * i, seed=seed, W_dec=torch.eye(4),
            state="interrupted" if (i, seed) == (3, 2) else "done",
        )
        for i in (1, 2, 3)
        for seed in (1, 2)
    }  # fmt: skip
    result = saeray.load_sweep(finished(tmp_path / "s", **of).path)
    narrow, wide = (table(result.rows, width) for width in (80, None))
    assert max(map(len, narrow)) < 80 < max(map(len, wide))
    assert narrow[0].split()[:3] == ["l1_coefficient", "seed", "status"]
    assert [line.split()[:3] for line in narrow[1:4]] == [
        ["0.0001", "1", "done"], ["0.0001", "2", "done"], ["0.0002", "1", "done"],
    ]  # fmt: skip
    assert [line.split()[0] for line in wide[1:7]] == [*of]
    assert [line.split()[0] for line in narrow[-3:]] == ["over", "0.0001", "0.0002"]


def test_a_summary_has_the_figures_over_seeds(tmp_path):
    eye = torch.eye(4)
    folder = finished(
        tmp_path / "seeds",
        **{"seed=1": sae(10.0, 0.8, 0.9, seed=1, W_dec=eye)},
        **{"seed=2": sae(12.0, 0.9, 0.9, seed=2, W_dec=eye)},
    )
    result = saeray.resume(folder.path)  # as a sweep's end: there is nothing to do
    summary = result.summary()
    assert [r["pw_mcc"] for r in result.rows] == pytest.approx([1.0, 1.0])
    # t is 12.706 with one degree of freedom, the standard deviation √2: ± 12.7 for the mean.
    assert "11.0 ± 12.7" in summary
    assert "0.1500 ± 0.6353" in summary
    assert saeray.load_sweep(folder.path).rows == result.rows


def test_a_sweep_may_be_moved(one, tmp_path, capsys):
    """results.csv has paths as they are from there; rows have whole ones, of where it is now."""
    columns = results_table(one.read("results.parquet")).to_pydict()
    assert columns["path"][:2] == [f"trials/{name}/final" for name in columns["trial"][:2]]
    moved = Path(one.path).rename(tmp_path / "moved")
    row = saeray.load_sweep(moved).best(l0=50)
    assert row["path"] == str(moved / "trials" / "mid" / "final")
    assert main(["best", str(moved), "--l0", "50"]) == 0
    assert one.path + "/" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"from the sweep's folder: load_sae\(f'\{SWEEP\}/"):
        saeray.load_sae(row | {"path": "trials/mid/final"})


def test_one_frontier_of_several_sweeps(one, other):
    frame = saeray.compare(one.path, other.path)
    assert list(zip(frame["sweep"], frame["trial"], strict=True))[5:] == [
        ("other", "wide"),
        ("other", "later"),
    ]
    # `wide` is sparser than `mid` and better in FVU, not in the CE score.
    assert list(frame["on_frontier_fvu"]) == [True, False, False, True, False, True, False]
    assert frame["on_frontier_ce_loss_score"][1]
    # Fields that differ only between the sweeps are columns too.
    assert frame["expansion_factor"].tolist() == [4] * 5 + [8, 16]
    assert frame["path"][1] == (one / "trials" / "mid" / "final").uri


def test_sweeps_of_one_name_are_told_apart(one, tmp_path):
    again = finished(tmp_path / "elsewhere" / "one", x=sae(10.0, 0.9, 0.9))
    assert set(saeray.compare(one.path, again.path)["sweep"]) == {one.uri, again.uri}


def test_figures_at_other_hook_points_are_not_compared(tmp_path, capsys):
    a = finished(tmp_path / "a", x=sae(10.0, 0.5, 0.5, hook_point="blocks.0.hook_resid_pre"))
    b = finished(tmp_path / "b", y=sae(20.0, 0.4, 0.4, hook_point="blocks.1.hook_resid_pre"))
    # The same hook point, written in another way.
    c = finished(
        tmp_path / "c",
        z=sae(9.0, 0.6, 0.6, hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer=1),
    )
    frame = saeray.compare(a.path, b.path, c.path)
    assert list(frame["on_frontier_fvu"]) == [True, False, True]
    assert main(["compare", a.path, b.path, c.path]) == 0
    out = capsys.readouterr().out
    assert "\nblocks.0.hook_resid_pre\n" in out and "\nblocks.1.hook_resid_pre\n" in out
    two = finished(
        tmp_path / "two",
        x=sae(10.0, 0.5, 0.5, hook_point="blocks.0.hook_resid_pre"),
        y=sae(11.0, 0.4, 0.4, hook_point="blocks.1.hook_resid_pre"),
    )
    assert main(["best", two.path, "--l0", "10"]) == 1
    assert "--where hook_point=" in capsys.readouterr().err
    where = ["--where", "hook_point=blocks.1.hook_resid_pre"]
    assert main(["best", two.path, "--l0", "10", *where]) == 0
    assert capsys.readouterr().out.startswith("y\n")


def test_another_held_out_text_is_warned_of(tmp_path, capsys):
    a = finished(tmp_path / "a", x=sae(10.0, 0.5, 0.5, eval_windows=8))
    b = finished(tmp_path / "b", y=sae(20.0, 0.6, 0.6, eval_windows=16))
    assert main(["compare", a.path, b.path]) == 0
    assert "! not all were judged on the same held-out text (eval_windows: 8, 16)." in (
        capsys.readouterr().out
    )


def test_best_prints_what_it_is_and_how_it_is_loaded(one, capsys):
    assert main(["best", one.path, "--l0", "50"]) == 0
    out = capsys.readouterr().out
    path = (one / "trials" / "mid" / "final").uri
    assert out.startswith("mid\n  L0 48.0 · FVU 0.1000 · CE score 0.9000 · KL – on held-out text")
    assert "3 dead features · done after 80 tokens" in out
    assert "  lr 0.0003 · l1_coefficient 0.001 · architecture standard · recipe guide · " in out
    assert f'saeray.load_sae("{path}"), or in sae_lens SAE.load_from_disk("{path}")' in out
    assert main(["best", one.path, "--l0", "50", "--by", "ce_loss_score", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["trial"], row["path"]) == ("mid", path)
    assert main(["best", one.path, "--l0", "50", "--where", "lr=1e-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trial"] == "worse"


def test_compare_prints_the_frontier_and_how_far_each_sweep_is(one, other, capsys):
    assert main(["compare", one.path, other.path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one: 4 of 5 SAEs, other: 1 of 2 SAEs so far"
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["low", "one", "10.0"],
        ["wide", "other", "40.0"],
        ["mid", "one", "48.0"],
        ["high", "one", "90.0"],
    ]
    assert lines[6:] == [
        "on the frontier of L0 and FVU: 2 of one, 1 of other",
        "on the frontier of L0 and CE: 2 of one, 1 of other",
    ]
    assert main(["compare", one.path, other.path, "--all"]) == 0
    assert "worse" in capsys.readouterr().out


def test_compare_computes_the_stability_that_is_asked_for(tmp_path, capsys):
    eye = torch.eye(4)
    folder = finished(
        tmp_path / "seeds",
        a=sae(10.0, 0.8, 0.9, seed=1, W_dec=eye),
        b=sae(12.0, 0.9, 0.9, seed=2, W_dec=eye),
        c=sae(14.0, 0.9, 0.9, seed=3, lr=1e-2),
        d=sae(14.0, 0.9, 0.9, seed=4, lr=1e-2),
    )
    assert main(["compare", folder.path]) == 0
    assert "1.000" not in capsys.readouterr().out
    assert main(["compare", folder.path, "--stability"]) == 0
    out = capsys.readouterr().out
    assert "1.000" in out and "! lr=0.01,l1_coefficient=0.001: no PW-MCC" in out
    assert saeray.load_sweep(folder.path).rows[0]["pw_mcc"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["best", "{}/no", "--l0", "50"], 2, "there is no sweep.yaml, so no sweep. Beside it: did"),
        (["best", "{}", "--l0", "50"], 2, "Sweeps in it: none, now"),
        (["best", "{}/none", "--l0", "50"], 1, "no SAE has finished (2 waiting)"),
        (["best", "{}/now", "--l0", "50"], 1, "Next to it: a with 10 (within 4)"),
        (["best", "{}/now", "--l0", "10", "--by", "cee"], 2, "by = 'cee'"),
        (["best", "{}/now", "--l0", "-1"], 2, "l0 = -1.0: a number above 0"),
        (["best", "{}/now", "--l0", "10", "--where", "lr"], 2, "FIELD=VALUE is wanted"),
        (["compare", "{}/now", "{}/no"], 2, "there is no sweep.yaml"),
        (["compare", "{}/none"], 1, "no SAE has finished"),
        (["compare", "{}/now", "{}/now"], 2, "twice"),
        (["compare", "odd://x/y"], 2, "SWEEP = 'odd://x/y'"),
    ],
)
def test_what_cannot_be_answered_is_one_paragraph(tmp_path, arguments, code, words, capsys):
    finished(tmp_path / "none", with_results=False, a=sae(lr=1e-3), b=sae(lr=2e-3))
    finished(tmp_path / "now", a=sae(10.0, 0.9, 0.9))
    assert main([a.replace("{}", str(tmp_path)) for a in arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("saeray: ") and err.count("\n") == 1
    assert words in err


def test_sweeps_in_an_object_store(one, s3, capsys):
    eye = torch.eye(4)
    there = finished(
        Folder.at(s3("choose")) / "there",
        a=sae(10.0, 0.8, 0.9, seed=1, W_dec=eye),
        b=sae(12.0, 0.9, 0.9, seed=2, W_dec=-eye),
    )
    result = saeray.load_sweep(there.uri)
    assert torch.equal(result.load(result.best(l0=12)).W_dec, -eye)
    assert main(["compare", one.path, there.uri, "--stability"]) == 0
    assert "on the frontier of L0 and FVU: 2 of there, 1 of one" in capsys.readouterr().out
    assert saeray.load_sweep(there.uri).rows[0]["pw_mcc"] == pytest.approx(1.0)
    assert main(["best", there.uri.replace("there", "hter"), "--l0", "10"]) == 2
    assert "Beside it: did you mean there?" in capsys.readouterr().err
    assert main(["best", there.uri.replace("choose/there", "none/x"), "--l0", "10"]) == 2
    err = capsys.readouterr().err
    assert "x" in err and err.count("\n") == 1
