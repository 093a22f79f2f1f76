"""The exports' fields and numbers, by hand. SAEDashboard's own code: test_sae_dashboard."""

import gzip
import json

import pytest
from support.feature_files import DEAD, L, by_hand

from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.report import features_export

SOURCE = "gpt2-small/2-my-sweep-lr-0.001-l1-coefficient-b-1-b"


def exported(where, kind, data=None):
    folder = Folder.at(where)
    feature_data.write(folder, data or by_hand())
    assert features_export.write(folder, kind) > 1000
    target = folder / kind
    return {name: target.read(name) for name in target.files()}


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("dashboards"), "saedashboard")


def test_features_that_fired_are_in_batches_and_the_others_are_named(dashboards):
    assert dashboards.keys() == {"batch-0.json", "skipped_indexes.json"}
    batch = json.loads(dashboards["batch-0.json"])
    assert (batch["model_id"], batch["layer"]) == ("gpt2-small", 2)
    assert batch["sae_set"] == SOURCE.partition("/2-")[2]
    assert [f["feature_index"] for f in batch["features"]] == [j for j in range(L) if j != DEAD]
    assert json.loads(dashboards["skipped_indexes.json"])["skipped_indexes"] == [DEAD]


def test_a_feature_as_sae_dashboard_has_it(dashboards):
    feature = json.loads(dashboards["batch-0.json"])["features"][0]
    assert (feature["pos_str"], feature["pos_values"]) == (["<script>", " cat"], [2.0, 1.0])
    assert (feature["neg_str"], feature["neg_values"]) == (["&", " the"], [-2.0, -1.0])
    assert feature["frac_nonzero"] == pytest.approx(3 / 18)
    assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (3, 6)
    heights, values = (feature[f"freq_hist_data_bar_{of}"] for of in ("heights", "values"))
    assert (sum(heights), heights[10], heights[40], len(values)) == (3, 2, 1, 41)
    assert values[10] == round(10.5 * 2 / 64, 3)
    top, band = feature["activations"]
    assert top == {
        "bin_min": -1, "bin_max": 1.0, "bin_contains": -1, "qualifying_token_index": 1,
        "tokens": [" the", "<script>", "alert(1)", "</script>", " cat"],  # without its BOS
        "values": [0.0, 1.0, 0.0, pytest.approx(0.5, abs=1e-4), 0.0],
    }  # fmt: skip
    assert (band["bin_min"], band["bin_max"]) == (0.75, 1.5)
    assert band["bin_contains"] == pytest.approx(1 / 18)


def test_a_free_decoder_is_given_with_rows_of_norm_1(tmp_path, dashboards):
    data = by_hand()
    data.arrays["decoder_norm"][:] = 2
    other = json.loads(exported(tmp_path, "saedashboard", data)["batch-0.json"])["features"][0]
    before = json.loads(dashboards["batch-0.json"])["features"][0]
    assert other["pos_values"] == [v / 2 for v in before["pos_values"]]
    assert other["activations"][0]["values"][1] == 2 * before["activations"][0]["values"][1]


def test_a_peak_at_bos_keeps_it(tmp_path):
    data = by_hand()
    data.arrays["position"][0, 0] = 0
    files = exported(tmp_path, "saedashboard", data)
    top = json.loads(files["batch-0.json"])["features"][0]["activations"][0]
    assert top["tokens"][0] == "<bos>" and top["qualifying_token_index"] == 0


def test_the_folder_that_neuronpedia_imports(tmp_path):
    files = exported(tmp_path, "neuronpedia")
    heads = ("model", "release", "source", "sourceset")
    assert files.keys() == {
        *(f"{SOURCE}/{name}.jsonl" for name in heads),
        f"{SOURCE}/features/batch-0.jsonl.gz", f"{SOURCE}/activations/batch-0.jsonl.gz",
    }  # fmt: skip
    rows = {name: json.loads(files[f"{SOURCE}/{name}.jsonl"]) for name in heads}
    assert rows["source"]["modelId"] == rows["sourceset"]["modelId"] == rows["model"]["id"]
    assert rows["source"]["setName"] == rows["sourceset"]["name"]
    assert rows["sourceset"]["releaseName"] == rows["release"]["name"]

    def lines(kind):
        text = gzip.decompress(files[f"{SOURCE}/{kind}/batch-0.jsonl.gz"])
        return [json.loads(line) for line in text.splitlines()]

    features, activations = lines("features"), lines("activations")
    assert len(features) == L - 1 and len(activations) == 2 * (L - 1)
    assert len({a["id"] for a in activations}) == len(activations)
    assert {f["layer"] for f in features} == {rows["source"]["id"]}
    first = next(a for a in activations if a["index"] == "0")
    assert (first["maxValue"], first["maxValueTokenIndex"], first["binMin"]) == (1.0, 1, -1)
    assert features[0]["topkCosSimIndices"] == [1, 2]
    assert "activations" not in features[0] and features[0]["maxActApprox"] == 1.0


def test_the_same_features_give_the_same_bytes(tmp_path):
    one, two = (exported(tmp_path / name, "neuronpedia") for name in ("one", "two"))
    assert one == two
