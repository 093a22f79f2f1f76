"""Folders, checkpoints and caches written by an earlier version are read like our own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import saeray
from saeray.cluster.options import options_of
from saeray.files.cache import ActivationCache, identities_of
from saeray.files.checkpoint import newest_checkpoint
from saeray.files.metrics_log import MetricsLog
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.lm.hub import load_tokenizer
from saeray.lm.model import LanguageModel
from saeray.sae.pack_step import PackStep
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, WAITING
from saeray.text.tokens import TokenWindows

CPU = torch.device("cpu")

WRITTEN = Path(__file__).parent / "written_by_0.1"
SAES = ["lr=0.001", "lr=0.003"]


@pytest.fixture(scope="module")
def cached():
    """The config of the sweep that made the cache, its language model and its text."""
    saes = yaml.safe_load((WRITTEN / "cached" / "sweep.yaml").read_text())["saes"]
    config = LanguageModelSAERunnerConfig.from_dict(saes["sae"])
    model = LanguageModel(config, [config.resolved_hook_point])
    return config, model, TokenWindows(config, load_tokenizer(config))


def sweep_folder(name):
    return SweepFolder(Folder.at(WRITTEN / name), name)


def test_a_finished_sweep_is_done_already():
    result = saeray.resume(WRITTEN / "finished")  # without Ray: there is nothing to do
    assert result.ok
    assert [(r["trial"], r["status"], r["n_training_tokens"]) for r in result.rows] == [
        (name, "done", 307_200) for name in SAES
    ]
    assert [row.metrics["eval/l0"] for row in result.status.rows] == [r["l0"] for r in result.rows]


def test_its_saes_are_found_where_they_are_now():
    """It wrote whole paths, of the machine it ran on."""
    rows = sweep_folder("finished").read_rows()
    assert [r["path"] for r in rows] == [f"{WRITTEN}/finished/trials/{n}/final" for n in SAES]
    assert [saeray.load_sae(r).cfg.name for r in rows] == SAES


def test_figures_of_another_meaning_are_read_under_the_name_they_have_now():
    # In results.csv 0.528…, the mean per token, is called explained_variance.
    row = sweep_folder("finished").read_rows()[0]
    assert row["explained_variance_per_token"] == pytest.approx(0.5282114148)
    assert row["explained_variance"] is None
    for name in SAES:
        metrics = sweep_folder("finished").known([name])[name].metrics
        assert "eval/explained_variance" not in metrics
        assert 0.5 < metrics["eval/explained_variance_per_token"] < 0.6
        assert 0 < metrics["metrics/l0"] != metrics["eval/l0"]  # of an earlier line's batch


def test_its_log_is_gone_on_with_without_mixing_the_two(tmp_path):
    shutil.copy(WRITTEN / "interrupted/trials/lr=0.003/metrics.jsonl", tmp_path)
    MetricsLog(Folder.at(tmp_path)).append(300, {"metrics/explained_variance": 0.5})
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(50, 301, 50))
    assert ["metrics/explained_variance" in x for x in lines] == [False] * 5 + [True]
    assert lines[0]["metrics/explained_variance_per_token"] == 0.11566212028265
    assert lines[0]["metrics/explained_variance_per_token_std"] == 0.16412806510925293


def test_its_saes_explain_the_activations_they_were_trained_on(cached):
    config, model, windows = cached
    x = model.activations(torch.from_numpy(windows.evaluation().copy()))
    x = x[config.resolved_hook_point].float()
    result = saeray.resume(WRITTEN / "finished")
    for row in result.rows:
        sae = result.load(row["trial"])
        assert (sae.d_in, sae.d_sae) == (128, 32)
        left = (sae(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert left < 0.6
        assert float((sae.encode(x) > 0).sum(dim=1).float().mean()) == pytest.approx(
            row["l0"], rel=0.1
        )


def test_an_interrupted_sweep_knows_where_each_sae_stands():
    files = sweep_folder("interrupted")
    assert list(files.read_configs()) == SAES
    # Its text is read as it was begun with.
    assert {c.text_version for c in files.read_configs().values()} == {1}
    known = files.known(SAES)
    assert [(k.state, k.step, k.n_training_tokens) for k in known.values()] == [
        (WAITING, 250, 64_000)
    ] * 2
    done = sweep_folder("finished").known(SAES)
    assert [(k.state, k.step) for k in done.values()] == [(DONE, 1200)] * 2


@pytest.mark.parametrize("name", SAES)
def test_a_checkpoint_is_valid_and_gone_on_from(name):
    config = sweep_folder("interrupted").read_configs()[name]
    trial = Folder.at(WRITTEN / "interrupted" / "trials" / name)
    found, passed_over = newest_checkpoint(trial / "checkpoints")
    assert passed_over == []
    assert found.numbers["n_training_tokens"] == 64_000
    trainer = found.trainer(options_of(config, CPU, 128), CPU)
    last = json.loads(trial.read("metrics.jsonl").splitlines()[-1])
    assert trainer.adam.param_groups[0]["lr"] == last["details/current_learning_rate"]
    PackStep().step([trainer], torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    assert trainer.step == 251


def test_every_block_of_a_cache_is_taken_and_is_what_would_be_harvested(cached):
    config, model, windows = cached
    facts, hook = model.facts, config.resolved_hook_point
    identity, earlier = identities_of(config, model.fingerprints(), facts.device, facts.d_in)
    before = {p: p.read_bytes() for p in (WRITTEN / "cache").rglob("*") if p.is_file()}
    cache = ActivationCache(str(WRITTEN / "cache"), identity, earlier)
    n = config.store_batch_size
    for block in range(8):
        tokens = windows.train(block * n, n)
        (array,) = cache.read([hook], block, tokens)
        harvested = model.activations(torch.from_numpy(tokens.copy()))[hook]
        # In float16, and perhaps by another kind of core.
        torch.testing.assert_close(torch.from_numpy(array.copy()), harvested, rtol=1e-2, atol=5e-2)
    (warning,) = cache.warnings
    assert "blocks of an earlier version" in warning
    assert {p: p.read_bytes() for p in (WRITTEN / "cache").rglob("*") if p.is_file()} == before
