"""Whole sweeps on real Ray: the architecture end to end, through each of its faces."""

import csv
import io
import json
import sys
import time

import pyarrow.parquet
import pytest
import ray
import torch
import yaml
from support.bundled import grid
from support.running import rosters, weights_of
from support.wandb_files import read_run

import saeray
from saeray.files.account import read_sessions
from saeray.files.checkpoint import load_sae
from saeray.files.results import COLUMNS
from saeray.files.storage import Folder
from saeray.sae.architectures.standard import StandardSAE

pytestmark = pytest.mark.usefixtures("ray_instance")

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for `Spy`


def free(ray):
    """What nobody has reserved; of the object store only that it is there."""
    return {k: v for k, v in ray.available_resources().items() if "memory" not in k}


def everything(ray):
    """What `free` is once nobody has reserved anything."""
    total = ray.cluster_resources()
    return {k: v for k, v in total.items() if "memory" not in k and "_group_" not in k}


def until_all_is_free(ray):
    deadline = time.monotonic() + 60
    while free(ray) != everything(ray) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert free(ray) == everything(ray)


def test_every_sae_of_the_grid_is_trained(six):
    result, _ = six
    assert result.ok
    assert [r["status"] for r in result.rows] == ["done"] * 6
    assert {(r["lr"], r["l1_coefficient"]) for r in result.rows} == {
        (lr, l1) for lr in (1e-3, 3e-3) for l1 in (3e-4, 1e-3, 3e-3)
    }
    assert {r["n_training_tokens"] for r in result.rows} == {64 * 1024}


def test_the_language_model_runs_once_for_all_of_them(six):
    status = six[0].status
    assert status.harvested_tokens <= 1.05 * 64 * 1024
    assert status.trained_tokens == 6 * 64 * 1024
    # Evaluated twice each (step 16 and the end of 32) on 8 windows of 64 tokens, counted apart.
    assert status.evaluation_tokens == 6 * 2 * 8 * 64


def test_results_tell_what_training_did(six):
    result, folder = six
    by_l1 = {}
    for r in result.rows:
        assert [c for c in COLUMNS if r[c] is None] == ["l0_loss"]  # an L1 SAE has none
        assert -1 < r["explained_variance"] == 1 - r["fvu"] < 1  # of 16 steps
        assert r["explained_variance_per_token"] != r["explained_variance"]
        assert 0 <= r["features_never_fired_held_out"] <= 512
        assert r["ce_loss_without_sae"] < r["ce_loss_with_sae"] < r["ce_loss_with_ablation"]
        assert r["kl_div"] > 0
        by_l1.setdefault(r["lr"], []).append((r["l1_coefficient"], r["l0"]))
    for line in by_l1.values():  # more L1, fewer features
        l0 = [v for _, v in sorted(line)]
        assert l0 == sorted(l0, reverse=True)
    read = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert [r["trial"] for r in read] == [r["trial"] for r in result.rows]
    assert float(read[0]["l0"]) == pytest.approx(result.rows[0]["l0"])
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweeps_folder_is_as_documented(six):
    result, folder = six
    data = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert set(data["saes"]) == {r["trial"] for r in result.rows}
    assert {"saeray", "ray", "torch", "git_commit"} <= set(data["versions"])
    for row in result.rows:
        trial = folder / "trials" / row["trial"]
        files = ["checkpoints", "features.parquet", "final", "metrics.jsonl"]
        assert sorted(p.name for p in trial.iterdir()) == files
        features = pyarrow.parquet.read_table(trial / "features.parquet").to_pandas()
        assert len(features) == 512
        assert int(features.dead_on_held_out.sum()) == row["features_never_fired_held_out"]
        assert features.density.sum() == pytest.approx(row["l0"])
        # 65,536 tokens in 2 checkpoints: one in the middle; the end is `final`.
        assert [p.name for p in (trial / "checkpoints").iterdir()] == ["32768"]
        lines = [json.loads(x) for x in (trial / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == list(range(4, 33, 4))
        for key in ("losses/mse_loss", "losses/l1_loss", "losses/overall_loss", "metrics/l0",
                    "metrics/explained_variance", "metrics/explained_variance_per_token",
                    "sparsity/dead_features",
                    "details/current_learning_rate", "details/n_training_tokens"):  # fmt: skip
            assert all(key in x for x in lines), key
        evaluated = [x["step"] for x in lines if "eval/CE_loss_score" in x]
        assert evaluated == [x["step"] for x in lines if "eval/l0" in x] == [16, 32]
        assert row["l0"] == lines[-1]["eval/l0"]
        # Not the loss: the L1 comes in over the first steps, and makes it sparser at any price.
        assert lines[-1]["metrics/l0"] < lines[0]["metrics/l0"]
        assert sum(lines[-1]["plots/feature_density_line_chart"]["counts"]) == 512
        assert row["path"] == str(trial / "final")
        about = json.loads((trial / "final" / "cfg.json").read_text())["metadata"]
        assert (about["bos_token"], about["bos_token_id"]) == ("<|endoftext|>", 0)
        assert isinstance(result.load(row["trial"]), StandardSAE)
    assert sorted(p.name for p in folder.iterdir() if p.name != "wandb") == [
        "account.json", "pareto.png", "report.html", "results.csv", "results.parquet", "sweep.yaml",
        "trials",
    ]  # fmt: skip


def test_its_page_and_its_account_are_there(six):
    result, folder = six
    (session,) = read_sessions(result.folder)
    assert session.harvested_tokens == result.status.harvested_tokens
    assert session.trained_tokens == 6 * 64 * 1024 == 6 * session.one_pass_tokens
    assert session.start_up_s > 0 and session.training_s > 0 and "%" in session.limit
    assert session.trainers_s["the SAEs' step"] > 0
    assert session.harvesters_s["the language model"] > 0
    page = (folder / "report.html").read_text()
    assert f"{session.harvested_tokens:,}" in page and session.placement[:20] in page
    assert page.count("<tr class=") == 6
    assert f"to look at: {folder}/report.html" in result.summary()


def test_wandb_has_one_offline_run_per_sae_and_one_of_the_sweep(six):
    result, folder = six
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    (whole,) = [r for r in map(read_run, runs) if r.job_type == "sweep"]
    assert whole.name == whole.group == "six"
    assert len(whole.tables["frontier"]["data"]) == whole.summary["saes/done"] == 6
    seen = {}
    for run in map(read_run, runs):
        if run.job_type == "sweep":
            continue
        seen[run.name] = run.group
        keys = {key for line in run.history for key in line}
        assert {
            "losses/mse_loss",
            "eval/CE_loss_score",
            "metrics/l0",
            "sparsity/dead_features",
        } <= keys
        assert any(k.startswith("plots/feature_density_line_chart") for k in keys), keys
        (row,) = [r for r in result.rows if r["trial"] == run.name]
        assert all(run.summary[c] == row[c] for c in ("l0", "fvu", "ce_loss_score", "kl_div"))
    assert seen == {r["trial"]: "six" for r in result.rows}


def test_nothing_is_left_behind(six, ray_instance):
    until_all_is_free(ray_instance)  # CPUs, and no placement group is left
    assert rosters("six") == []


@pytest.mark.slow
@pytest.mark.ci
def test_packing_waves_and_harvesters_do_not_change_a_bit(six, tmp_path):
    result = six[0]
    apart = grid(
        lr=1e-3,
        n_checkpoints=0,
        log_to_wandb=False,
        # Beside harvesters of half a core in all there is room for one pack of one and a half.
        resources=dict(harvesters=3, harvester_cpus=0.16, saes_per_trainer=2, trainer_cpus=1),
        activation_cache=str(tmp_path / "cache"),
    )
    again = saeray.sweep(apart, name="apart", storage_path=tmp_path, live=False)
    assert again.ok
    assert [len(p) for p in again.status.packs] == [2, 1]
    # Packs that do not run at the same time can't share a block in the buffer: two passes, of which
    # the second finds in the cache what the first one has harvested.
    assert "2 passes over the text (2 packs, 1 at a time); one by " in again.status.placement
    assert "all but the first from activation_cache" in again.status.placement
    assert again.status.harvested_tokens == again.status.cached_tokens == 64 * 1024
    for row in again.rows:
        same = dict(lr=1e-3, l1_coefficient=row["l1_coefficient"])
        assert weights_of(again, **same) == weights_of(result, **same)
        (other,) = [r for r in result.rows if r["trial"] == f"lr=0.001,{row['trial']}"]
        assert row["ce_loss_score"] == other["ce_loss_score"]


@pytest.mark.slow
def test_streams_that_do_not_fit_beside_each_other_come_one_after_the_other(
    tiny, tmp_path, ray_instance, alone
):
    cpus = ray_instance.cluster_resources()["CPU"]
    config = tiny | dict(
        context_size=[32, 64],
        resources=dict(harvester_cpus=1, trainer_cpus=cpus - 1),
        wait_limit_s=60,
    )
    result = saeray.sweep(config, name="streams", storage_path=tmp_path, live=False)
    assert [row["status"] for row in result.rows] == ["done", "done"]
    # Each made a pass of its own, and both are accounted for.
    assert result.status.harvested_tokens == 2 * 16 * 1024
    assert result.status.trained_tokens == 2 * 16 * 1024
    assert "one SAE of each of 2 streams trained on 32,768 (1.000x)" in result.summary()
    assert weights_of(result, context_size=64) == weights_of(alone)


@pytest.mark.slow
def test_a_trial_that_starts_when_the_others_are_done(tiny, tmp_path, ray_instance):
    from ray import tune

    analysis = tune.run(
        saeray.SAETrial,
        config=tiny | {"lr": tune.grid_search([1e-3, 2e-3])},
        storage_path=str(tmp_path),
        name="late",
        max_concurrent_trials=1,
        verbose=0,
    )
    assert [t.last_result["n_training_tokens"] for t in analysis.trials] == [16 * 1024] * 2
    sweep = yaml.safe_load((tmp_path / "late" / "sweep.yaml").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "late" / "results.csv").read_text())))
    assert {r["trial"] for r in rows} == set(sweep["saes"])
    assert [r["status"] for r in rows] == ["done"] * 2
    until_all_is_free(ray_instance)
    assert rosters("late") == []


def test_the_guides_snippet(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from saeray import LanguageModelSAERunnerConfig, language_model_sae_runner

    cfg = LanguageModelSAERunnerConfig(
        # Data Generating Function (Model + Training Distibuion)
        model_name=tiny["model_name"],
        hook_point="blocks.2.hook_resid_pre",
        hook_point_layer=2,
        d_in=128,
        dataset_path=tiny["dataset_path"],
        is_dataset_tokenized=False,
        # SAE Parameters
        expansion_factor=4,
        b_dec_init_method="geometric_median",
        # Training Parameters
        lr=0.0004,
        l1_coefficient=0.00008,
        lr_scheduler_name="constantwithwarmup",
        train_batch_size=1024,
        context_size=128,
        lr_warm_up_steps=5000,
        # Activation Store Parameters
        n_batches_in_buffer=4,
        training_tokens=1_000 * 16,
        store_batch_size=8,
        # Dead Neurons and Sparsity
        use_ghost_grads=True,
        feature_sampling_window=1000,
        dead_feature_window=5000,
        dead_feature_threshold=1e-6,
        # WANDB
        log_to_wandb=True,
        wandb_project="gpt2",
        wandb_entity=None,
        wandb_log_frequency=100,
        # Misc
        device="cpu",
        seed=42,
        n_checkpoints=10,
        checkpoint_path="checkpoints",
        dtype=torch.float32,
    )
    sparse_autoencoder = language_model_sae_runner(cfg)

    assert (sparse_autoencoder.d_in, sparse_autoencoder.d_sae) == (128, 512)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    # 16,000 tokens by tens, less the end: 9 checkpoints.
    assert len(list((folder / "trials" / "sae" / "checkpoints").iterdir())) == 9
    x = torch.randn(3, 128)
    assert torch.equal(sparse_autoencoder(x), load_sae(str(folder / "trials/sae/final"))(x))
    about = sparse_autoencoder.cfg
    assert (about.name, about.hook_point, about.lr) == ("sae", cfg.hook_point, cfg.lr)
    assert repr(sparse_autoencoder).startswith("<SAE sae: standard 128 -> 512 at blocks.2.hook")
    assert f"results: {folder}" in capsys.readouterr().out


class Spy(saeray.SAETrial):
    """Reports whether its process has imported torch."""

    def step(self):
        return super().step() | {"torch_is_loaded": "torch" in sys.modules}


@pytest.mark.slow  # in CI a late trial, and trials from a laptop between hosts, are run like this
def test_plain_tune_run(tiny, tmp_path):
    from ray import tune

    analysis = tune.run(
        Spy,
        config=tiny
        | {
            "l1_coefficient": tune.grid_search([1e-3, 2e-3]),
            "lr": tune.grid_search([1e-3, 2e-3]),
        },
        storage_path=str(tmp_path),
        name="plain",
        verbose=0,
    )
    assert len(analysis.trials) == 4
    for trial in analysis.trials:
        last = trial.last_result
        assert last["done"]
        assert last["n_training_tokens"] == 16 * 1024
        assert last["torch_is_loaded"] is False
        assert last["metrics/explained_variance"] < 1
        assert load_sae(last["path"]).d_sae == 256
    # One pack, one stream, beside Tune's own files.
    rows = list(csv.DictReader(io.StringIO((tmp_path / "plain" / "results.csv").read_text())))
    assert [r["status"] for r in rows] == ["done"] * 4


ASHA_STEPS = 600


@pytest.mark.slow
@pytest.mark.ci
def test_asha_stops_some_and_the_others_of_the_pack_go_on(tiny, tmp_path):
    from ray import tune

    results = tune.Tuner(
        Spy,
        param_space=tiny
        | {
            # Long enough for Tune, whose trials start meanwhile, to decide while the pack trains.
            "training_tokens": ASHA_STEPS * 1024,
            "expansion_factor": 8,
            "wandb_log_frequency": 5,
            "eval_every": 20,
            # The worst last: ASHA lets the first that comes to a rung pass it, and a trial that is
            # up before the others gets through all the reports there are at once.
            "lr": tune.grid_search([1e-3, 2e-3, 4e-3, 1e-5]),
        },
        tune_config=tune.TuneConfig(
            metric="metrics/CE_loss_score",
            mode="max",
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="n_training_tokens",
                max_t=ASHA_STEPS * 1024,
                grace_period=20 * 1024,
                reduction_factor=2,
            ),
        ),
        run_config=tune.RunConfig(name="asha", storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert not results.errors
    assert [r.metrics["torch_is_loaded"] for r in results] == [False] * 4
    tokens = {r.config["lr"]: r.metrics["n_training_tokens"] for r in results}
    assert max(tokens.values()) == ASHA_STEPS * 1024
    assert tokens[1e-5] < ASHA_STEPS * 1024  # the worst was stopped
    best = results.get_best_result(metric="metrics/CE_loss_score", mode="max")
    assert best.config["lr"] > 1e-5
    for r in results:  # stopped or not
        names = {saeray.load_sae(x).cfg.folder for x in (r, r.checkpoint, r.metrics)}
        assert names == {r.metrics["path"]}
    assert (tmp_path / "asha" / "pareto.png").exists()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "asha" / "results.csv").read_text())))
    statuses = {float(r["lr"]): r["status"] for r in rows}
    assert statuses[1e-5] == "stopped"
    assert "done" in statuses.values()
    assert set(statuses.values()) == {"done", "stopped"}
    assert (tmp_path / "asha" / "report.html").read_text().count("<tr class=") == 4
    (session,) = read_sessions(Folder.at(tmp_path / "asha"))
    assert session.trained_tokens == sum(int(r["n_training_tokens"]) for r in rows)
    for r in rows:  # stopped ones are kept and evaluated too
        assert load_sae(str(tmp_path / "asha" / r["path"])).d_sae == 1024
        assert float(r["ce_loss_score"]) < 1
    told = {r.metrics["path"]: r.metrics["n_training_tokens"] for r in results}
    assert told == {
        str(tmp_path / "asha" / r["path"]): int(float(r["n_training_tokens"])) for r in rows
    }
