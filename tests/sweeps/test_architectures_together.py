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


# A transcoder of the layer's MLP, beside the SAEs at HOOK, and one to a wider place.
MLP = dict(
    hook_point="blocks.2.mlp.hook_in",
    hook_point_out="blocks.2.hook_mlp_out",
    feature_sampling_method=None,  # is an SAE's
)
TRANSCODERS = [
    MLP,
    MLP | dict(architecture="topk", skip_connection=True),
    dict(
        architecture="jumprelu", hook_point_out="blocks.2.mlp.hook_post", skip_connection=True,
        feature_sampling_method=None,
    ),
]  # fmt: skip


def weights(result):
    return {
        (row["architecture"], row.get("hook_point_out")): (
            Path(row["path"]) / "sae_weights.safetensors"
        ).read_bytes()
        for row in result.rows
    }


@pytest.mark.slow
@pytest.mark.ci
def test_all_architectures_in_one_pack_are_what_each_is_alone(
    ray_instance, tiny, tmp_path, monkeypatch
):
    # Fewer trials at a time than SAEs: they take turns, and each other's processes.
    monkeypatch.setattr("saeray.client.trials.TRIALS_AT_ONCE", 3)
    points = [dict(architecture=a) for a in ARCHITECTURES] + TRANSCODERS
    together = saeray.sweep(
        tiny | FIELDS | dict(grid=points), name="together", storage_path=tmp_path, live=False
    )
    assert [r["status"] for r in together.rows] == ["done"] * 10
    assert [r["architecture"] for r in together.rows][:7] == ARCHITECTURES
    assert [len(pack) for pack in together.status.packs] == [10]
    folder = next(Path(r["path"]).parent for r in together.rows if r["architecture"] == "standard")
    log = (folder / "metrics.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["sparsity/resampled"] > 0
    assert together.status.resampling_tokens > 0
    points = [dict(architecture=a) for a in ("standard", "matryoshka")] + TRANSCODERS
    each = dict(grid=points, resources={"saes_per_trainer": 1})
    alone = saeray.sweep(tiny | FIELDS | each, name="alone", storage_path=tmp_path, live=False)
    both = weights(together)
    assert len(both) == 10
    for name, data in weights(alone).items():
        assert both[name] == data, name
    for row in together.rows:
        sae = load_sae(row["path"])
        assert row["l0"] == pytest.approx(8) or row["architecture"] != "topk"
        assert 0 < row["l0"] <= sae.d_sae
        assert (0 < row["fvu"] < 2 and 0 < row["ce_loss_score"] <= 1) or sae.d_out == 512
        assert sae.is_transcoder == (row["hook_point_out"] is not None)
    wide = load_sae(together.rows[-1]["path"])
    assert (wide.architecture, wide.d_in, wide.d_out) == ("jumprelu_skip_transcoder", 128, 512)
    assert wide.W_skip.any()
