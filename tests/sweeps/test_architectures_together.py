"""SAEs of every architecture in one pack, off one stream: each as if it were alone."""

import json
from pathlib import Path

import pytest

import saeray
from saeray.files.checkpoint import load_sae

FIELDS = dict(
    recipe="sae_lens", lr=3e-3, dead_feature_window=3, feature_sampling_window=5,
    feature_sampling_method="anthropic", l1_coefficient=2.0, k=8, target_l0=8,
    auxk_scaling="dead_share",
)  # fmt: skip
ARCHITECTURES = ["standard", "p_anneal", "gated", "topk", "batchtopk", "matryoshka", "jumprelu"]


def weights(result):
    return {
        row["architecture"]: (Path(row["path"]) / "sae_weights.safetensors").read_bytes()
        for row in result.rows
    }


def test_all_architectures_in_one_pack_are_what_each_is_alone(ray_instance, tiny, tmp_path):
    together = saeray.sweep(
        tiny | FIELDS | dict(architecture=ARCHITECTURES),
        name="together", storage_path=tmp_path, live=False,
    )  # fmt: skip
    assert [r["status"] for r in together.rows] == ["done"] * 7
    assert {r["architecture"] for r in together.rows} == set(ARCHITECTURES)
    log = (tmp_path / "together" / "trials" / "architecture=standard" / "metrics.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["sparsity/resampled"] > 0
    assert together.status.resampling_tokens > 0
    each = dict(architecture=["standard", "matryoshka"], resources={"saes_per_trainer": 1})
    alone = saeray.sweep(tiny | FIELDS | each, name="alone", storage_path=tmp_path, live=False)
    both = weights(together)
    for name, data in weights(alone).items():
        assert both[name] == data, name
    for row in together.rows:
        sae = load_sae(row["path"])
        assert row["l0"] == pytest.approx(8) or row["architecture"] != "topk"
        assert 0 < row["l0"] <= sae.d_sae
