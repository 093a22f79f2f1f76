"""Sweeps that keep their blocks in an activation cache, and those that find them there."""

import json

import pytest

import saeray
from saeray.errors import ConfigError
from saeray.files.storage import Folder


def weights(result):
    (row,) = result.rows
    return (result.folder / "trials" / row["trial"] / "final").read("sae_weights.safetensors")


def test_a_second_sweep_harvests_nothing(s3, ray_instance, tiny, tmp_path):
    # Checkpoints on an object store, where lines of the log are written from time to time only.
    tiny |= dict(activation_cache=s3("cache"), resources=dict(harvesters=2), checkpoint_every_s=0.1)
    # The results of the first go to S3 as well, those of the second to a local folder.
    first = saeray.sweep(tiny, name="first", storage_path=s3("results"), live=False)
    assert first.status.harvested_tokens == 16 * 1024
    assert set(first.folder.names()) == {
        "pareto.png", "results.csv", "results.parquet", "sweep.yaml", "trials",
    }  # fmt: skip
    lines = (first.folder / "trials" / first.rows[0]["trial"]).read("metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16]
    second = saeray.sweep(tiny, name="second", storage_path=tmp_path, live=False)
    assert second.status.harvested_tokens == 0
    assert second.status.cached_tokens == 16 * 1024
    assert weights(second) == weights(first)


def test_what_is_missing_or_damaged_is_harvested_again(s3, ray_instance, tiny, tmp_path):
    tiny |= dict(activation_cache=str(tmp_path / "cache"))
    saeray.sweep(tiny, name="first", storage_path=tmp_path, live=False)
    (digest,) = Folder.at(tmp_path / "cache").names()
    blocks = tmp_path / "cache" / digest / tiny["hook_point"]
    assert len(list(blocks.iterdir())) == 16
    damaged, missing = blocks / "00000005.arrow", blocks / "00000007.arrow"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    missing.unlink()
    # Another buffer and another rate read the same blocks.
    other = tiny | dict(lr=2e-3, n_batches_in_buffer=8)
    second = saeray.sweep(other, name="second", storage_path=tmp_path, live=False)
    assert second.status.harvested_tokens == 2 * 1024
    assert second.status.cached_tokens == 14 * 1024
    assert any("00000005.arrow" in w for w in second.status.warnings)
    assert damaged.read_bytes() == whole
    assert missing.exists()


def test_a_cache_nobody_can_open_is_refused_by_its_own_name(tiny, tmp_path):
    with pytest.raises(ConfigError, match="activation_cache = 'nosuch://x'"):
        saeray.sweep(tiny | dict(activation_cache="nosuch://x"), storage_path=tmp_path, name="x")
