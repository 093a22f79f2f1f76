"""Sweeps that keep their blocks in an activation cache, and those that find them there.

That a whole sweep harvests nothing, `test_command` shows.
"""

import json

import pytest
from support.running import weights_of

import saeray
from saeray.errors import ConfigError
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder


def test_a_sweep_fills_a_cache_on_s3_and_leaves_its_results_there(alone, tiny):
    assert alone.status.harvested_tokens == 16 * 1024
    assert set(alone.folder.names()) == {
        "account.json", "pareto.png", "report.html", "results.csv", "results.parquet", "sweep.yaml",
        "trials",
    }  # fmt: skip
    # Where lines of the log are written from time to time only, while checkpoints wait for them.
    lines = (alone.folder / "trials" / alone.rows[0]["trial"]).read("metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16]


def activation_cache_of(result):
    (config,) = SweepFolder(result.folder, result.name).read_configs().values()
    return config.activation_cache


@pytest.mark.slow
@pytest.mark.ci
def test_what_is_missing_or_damaged_is_harvested_again(alone, tiny, tmp_path):
    cache = activation_cache_of(alone)
    (digest,) = Folder.at(cache).names()
    blocks = Folder.at(cache) / digest / tiny["hook_point"]
    assert len(blocks.names()) == 16
    whole = blocks.read("00000005.arrow")
    blocks.write("00000005.arrow", whole[:-9])
    blocks.filesystem.delete_file(f"{blocks.path}/00000007.arrow")
    second = saeray.sweep(
        tiny | dict(activation_cache=cache), name="second", storage_path=tmp_path, live=False
    )
    assert second.status.harvested_tokens == 2 * 1024
    assert second.status.cached_tokens == 14 * 1024
    assert any("00000005.arrow" in w for w in second.status.warnings)
    assert blocks.read("00000005.arrow") == whole
    assert len(blocks.names()) == 16
    assert weights_of(second) == weights_of(alone)


def test_a_cache_nobody_can_open_is_refused_by_its_own_name(tiny, tmp_path):
    with pytest.raises(ConfigError, match="activation_cache = 'nosuch://x'"):
        saeray.sweep(tiny | dict(activation_cache="nosuch://x"), storage_path=tmp_path, name="x")
