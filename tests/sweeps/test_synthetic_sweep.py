"""A sweep on known features, on real Ray: the same plane, with the ground truth in its results."""

import csv
import io
import json

import pytest
import yaml
from support.running import weights_of

import saeray
from saeray.client.cli import main

pytestmark = pytest.mark.usefixtures("ray_instance")

FIELDS = dict(
    model_name="synthetic:d_in=16,features=32,l0=2",
    expansion_factor=2,
    l1_coefficient=[3e-3, 1e-2],
    lr=3e-3,
    context_size=64,
    store_batch_size=16,
    n_batches_in_buffer=4,
    train_batch_size=256,
    training_tokens=200 * 256,
    b_dec_init_rows=256,
    eval_windows=16,
    eval_every=100,
    wandb_log_frequency=20,
    log_to_wandb=False,
    device="cpu",
    seed=7,
)


@pytest.fixture(scope="module")
def swept(ray_instance, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return saeray.sweep(FIELDS, name="known", storage_path=folder, live=False), folder / "known"


def test_results_have_the_ground_truth(swept):
    result, folder = swept
    assert result.ok
    for row in result.rows:
        assert 0.3 < row["mcc"] <= 1
        assert 0 <= row["features_found"] <= 1
        assert 0 < row["firing_f1"] <= 1
        assert row["true_l0"] == pytest.approx(2, rel=0.1)
        assert row["ce_loss_score"] is None
        log = (folder / "trials" / row["trial"] / "metrics.jsonl").read_text().splitlines()
        by_step = {line["step"]: line.get("ground_truth/mcc") for line in map(json.loads, log)}
        assert {step for step, mcc in by_step.items() if mcc is not None} == {100, 200}
        assert by_step[200] == row["mcc"] > by_step[100]
    read = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert [float(r["mcc"]) for r in read] == [r["mcc"] for r in result.rows]
    title, *_ = result.summary().splitlines()
    assert {"MCC", "found", "F1", "shrunk"} <= set(title.split())
    assert "CE" not in title
    assert result.status.harvested_tokens <= 1.05 * 200 * 256
    assert (folder / "pareto.png").exists()


@pytest.mark.slow
def test_two_harvesters_change_no_byte(swept, tmp_path):
    two = dict(harvesters=2, harvester_cpus=0.25, trainer_cpus=1)
    again = saeray.sweep(
        FIELDS | dict(resources=two), name="two", storage_path=tmp_path, live=False
    )
    assert again.ok
    for row, other in zip(again.rows, swept[0].rows, strict=True):
        same = dict(l1_coefficient=row["l1_coefficient"])
        assert weights_of(again, **same) == weights_of(swept[0], **same)
        assert row["mcc"] == other["mcc"]


def test_a_dry_run_with_an_address_is_the_clusters(ray_instance, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(FIELDS))
    assert main(["sweep", str(file), "--dry-run", "--address", "auto"]) == 0
    out = capsys.readouterr().out
    cpus = ray_instance.cluster_resources()["CPU"]
    assert f"on the cluster of 1 nodes: 1 harvester ({0.5 if cpus < 4 else 1:g} CPUs)" in out
    assert "1 pack, 1 at a time; 1 pass of the language model" in out
    assert "text: none: the model is synthetic" in out
    plan = saeray.plan(FIELDS, address="auto", seconds=0.5)  # measured in a task of the cluster
    assert plan.forecast.total > plan.forecast.training > 0
    assert f"on the cluster of 1 nodes: 1 harvester ({0.5 if cpus < 4 else 1:g} CPUs)" in str(plan)
    assert main(["sweep", str(file), "--dry-run", "--address", "auto", "--set", "device=cuda"]) == 2
    assert "the cluster has no GPU" in capsys.readouterr().err
