"""Storage, checkpoints, metrics and results: whole or not at all, and readable by others."""

import csv
import io
import json

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load

from saeray.cluster.pack import checkpoint_steps, options_of
from saeray.errors import ConfigError
from saeray.files.checkpoint import (
    load_sae,
    newest_checkpoint,
    save_checkpoint,
    save_final,
)
from saeray.files.results import result_row, varying_fields, write_pareto, write_results
from saeray.files.storage import Folder
from saeray.files.tracking import MetricsLog, NoRun, open_run
from saeray.sae.standard import initial_sae
from saeray.sae.trainer import PackStep, SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve


def config(**changes):
    values = dict(
        model_name="m",
        hook_point="blocks.2.hook_resid_pre",
        dataset_path="d",
        train_batch_size=8,
        training_tokens=80,
        log_to_wandb=False,
    )
    return resolve(LanguageModelSAERunnerConfig(**(values | changes)))


def trained(c, steps=3):
    sae = initial_sae(4, 16, seed=0, b_dec=torch.zeros(4), dtype=torch.float32)
    trainer = SAETrainer(sae, options_of(c))
    for i in range(steps):
        PackStep().step([trainer], torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
    return trainer


def test_a_folder_is_published_whole(tmp_path):
    folder = Folder.at(tmp_path) / "a" / "b"
    folder.publish({"one": b"1", "two": b"2"})
    folder.publish({"one": b"3"})
    assert folder.names() == ["one"]
    assert folder.read("one") == b"3"
    assert (Folder.at(tmp_path) / "a").names() == ["b"]  # nothing half-written beside it
    assert Folder.at(tmp_path / "missing").names() == []


def test_object_storage_through_the_same_code():
    folder = Folder.at("memory://bucket/sweep") / "final"  # fsspec's own store in memory
    folder.publish({"cfg.json": b"{}", "marker": b"x"})
    assert folder.names() == ["cfg.json", "marker"]
    assert folder.read("cfg.json") == b"{}"
    assert not folder.is_local
    with pytest.raises(ConfigError, match="storage_path = 'nonsense://x'"):
        Folder.at("nonsense://x")


def test_the_files_sae_lens_reads(tmp_path):
    c = config(seed=3)
    t = trained(c)
    save_final(Folder.at(tmp_path / "final"), c, t)
    cfg = json.loads((tmp_path / "final" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (
        "standard", 4, 16, "float32",
    )  # fmt: skip
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_pre"
    weights = load((tmp_path / "final" / "sae_weights.safetensors").read_bytes())
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    assert shapes == {"W_enc": (4, 16), "W_dec": (16, 4), "b_enc": (16,), "b_dec": (4,)}
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(16))
    sparsity = load((tmp_path / "final" / "sparsity.safetensors").read_bytes())["sparsity"]
    torch.testing.assert_close(sparsity, torch.log10(t.firing_frequency + 1e-10).float())
    x = torch.randn(5, 4)
    assert torch.equal(load_sae(str(tmp_path / "final"))(x), t.sae(x))


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    c = config(use_ghost_grads=True, dead_feature_window=1)
    whole, t = trained(c, 6), trained(c, 3)
    folder = Folder.at(tmp_path)
    save_checkpoint(folder / "24", c, t)
    found, _ = newest_checkpoint(folder)
    resumed = found.trainer(options_of(c), torch.device("cpu"))
    for i in range(3, 6):
        PackStep().step([resumed], torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(resumed.sae, name), getattr(whole.sae, name))


@pytest.mark.parametrize("harm", ["cut off", "changed", "marker missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, harm):
    c, folder = config(), Folder.at(tmp_path)
    save_checkpoint(folder / "8", c, trained(c, 1))
    save_checkpoint(folder / "16", c, trained(c, 2))
    weights = tmp_path / "16" / "sae_weights.safetensors"
    if harm == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif harm == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        (tmp_path / "16" / "train_state.json").unlink()
    found, passed_over = newest_checkpoint(folder)
    assert found.numbers["step"] == 1
    assert len(passed_over) == 1
    assert "16" in passed_over[0]


def test_checkpoints_come_at_the_guides_tokens():
    # range(0, 80, 80 // 4)[1:] = 20, 40, 60 tokens: steps 2.5 -> 2, 5, 7.5 -> 8 of 8 tokens.
    assert checkpoint_steps(config(n_checkpoints=4)) == {2, 5, 8}
    assert checkpoint_steps(config(n_checkpoints=0)) == set()


def test_metrics_are_logged_once_per_step_even_after_a_restart(tmp_path):
    log = MetricsLog(Folder.at(tmp_path))
    assert log.append(4, {"losses/mse_loss": 1.0})
    assert log.append(8, {"losses/mse_loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "los')  # cut off by a crash
    again = MetricsLog(Folder.at(tmp_path))
    assert not again.append(8, {"losses/mse_loss": 0.5})
    assert again.append(12, {"losses/mse_loss": 0.4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_wandb_that_is_missing_is_one_warning(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # what importing it then raises is ImportError
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, warning = open_run(config(log_to_wandb=True), "a", "s", Folder.at(tmp_path))
    assert isinstance(run, NoRun)
    assert "wandb is not installed" in warning
    run, warning = open_run(config(log_to_wandb=False), "a", "s", Folder.at(tmp_path))
    assert isinstance(run, NoRun)
    assert warning is None


def test_results_have_a_row_per_sae_and_a_column_per_varying_field(tmp_path):
    configs = [config(lr=lr, seed=s) for lr in (1e-3, 2e-3) for s in (1, 2)]
    axes = varying_fields(configs)
    assert {"lr", "seed", "l1_coefficient"} <= set(axes)
    assert "model_name" not in axes
    figures = {
        "metrics/l0": 12.5,
        "metrics/CE_loss_score": 0.9,
        "metrics/explained_variance": 0.8,
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
    assert (float(read[0]["l0"]), float(read[0]["lr"])) == (12.5, 1e-3)
    assert (read[3]["status"], read[3]["error"], read[3]["l0"]) == ("failed", "the loss is nan", "")
    assert pyarrow.parquet.read_table(tmp_path / "results.parquet").num_rows == 4
    write_pareto(folder, rows, "title")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_on_s3_is_used_like_a_local_one(s3):
    root = Folder.at(s3("results"))
    folder = root / "sweep" / "trials"
    folder.publish({"a": b"1", "b": b"2"})
    again = Folder.at(folder.uri)  # as another process opens it
    assert again.names() == ["a", "b"]
    assert again.read("b") == b"2"
    assert (again.name, Folder.at(again.parent_uri).names()) == ("trials", ["trials"])
    folder.delete()
    assert not again.exists()


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA123:topsecret@bucket/x", "s3://bucket/x?access_key=AKIA123&secret_key=topsecret"],
)
def test_a_key_in_a_uri_is_refused_and_not_repeated(uri):
    with pytest.raises(ConfigError, match=r"storage_path.*environment") as refused:
        Folder.at(uri)
    assert "topsecret" not in str(refused.value)


def test_a_cache_nobody_can_open_is_refused_by_its_own_name(tiny, tmp_path):
    import saeray

    with pytest.raises(ConfigError, match="activation_cache = 'nosuch://x'"):
        saeray.sweep(tiny | dict(activation_cache="nosuch://x"), storage_path=tmp_path, name="x")
