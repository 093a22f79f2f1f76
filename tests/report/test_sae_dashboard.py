"""What SAEDashboard itself makes of our export, and of the same SAE, model and tokens. Slow: its
environment (it needs another transformer_lens) is made at the first run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import features as of
from support.bundled import MODEL, ROOT
from support.peers_python import python_with

from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.report import features_export

sys.path.insert(0, str(ROOT / "benchmarks"))

# SAEDashboard's own runner and converter on the SAE, model and tokens; and its classes on our file.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from sae_dashboard.components_config import *
from sae_dashboard.layout import Column, SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, sae_path, tokens_path, ours_path, out = sys.argv[1:]
ours = json.loads(Path(ours_path).read_text())
read = NeuronpediaDashboardBatch(**ours)
assert read.to_dict() == ours, "their classes do not give our file back"

hf = AutoModelForCausalLM.from_pretrained(model_path).eval()
c = hf.config
model = HookedSAETransformer(HookedTransformerConfig(
    n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head,
    n_heads=c.n_head, d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new",
    normalization_type="LN", eps=c.layer_norm_epsilon, device="cpu",
))
# As HookedTransformer.from_pretrained does; but the residual stream stays what the SAE has seen.
model.load_and_process_state_dict(
    convert_gpt2_weights(hf, model.cfg), fold_ln=True, center_unembed=True,
    center_writing_weights=False, fold_value_biases=False,
)
model.tokenizer = AutoTokenizer.from_pretrained(model_path)
sae = SAE.load_from_disk(sae_path)
tokens = load_file(tokens_path)["tokens"].long()
features = [f["feature_index"] for f in ours["features"]]
layout = SaeVisLayoutConfig(columns=[Column(
    SequencesConfig(stack_mode="stack-all", buffer=None, compute_buffer=True, n_quantiles=3,
                    top_acts_group_size=6, quantile_group_size=2),
    ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(),
    FeatureTablesConfig(n_rows=3),
)])
vis = SaeVisRunner(SaeVisConfig(
    hook_point=sae.cfg.metadata.hook_name, features=features, feature_centric_layout=layout,
    minibatch_size_tokens=8, device="cpu", dtype="float32",
)).run(encoder=sae, model=model, tokens=tokens)
config = NeuronpediaRunnerConfig(
    sae_set=ours["sae_set"], sae_path=sae_path, np_set_name=ours["sae_set"],
    outputs_dir=".", huggingface_dataset_path="text", n_prompts_total=len(tokens),
)
config.model_id, config.layer = ours["model_id"], ours["layer"]
vocabulary = {i: str(i) for i in range(model.cfg.d_vocab)}
Path(out).write_text(NeuronpediaConverter.convert_to_np_json(model, vis, config, vocabulary))
"""


@pytest.fixture(scope="module")
def python():
    return python_with("sae_dashboard")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sae_dashboard_reads_our_file_and_makes_the_same_figures(python, tmp_path, monkeypatch):
    monkeypatch.setattr("saeray.stream.feature_harvester.seen_from_here", Folder.at)
    sae = of.sparse_sae(0)
    norms = 0.5 + np.arange(of.L, dtype=np.float32) / of.L  # a free decoder
    sae.W_dec.data *= of.torch.from_numpy(norms).unsqueeze(1)
    folder = of.sweep_of(tmp_path / "sweep", a=sae)
    one, _ = of.harvester(of.job_of(folder, "a"))
    parts = of.parts()
    tokens = np.concatenate([t for _, t in parts])
    for part in parts:
        one.collect(*part)
    one.finish("a", tokens, of.FIRSTS, of.ABOUT | {"sae": "a"})
    place = folder / "features" / "a"
    features_export.write(place, "saedashboard")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    ours_at = tmp_path / "sweep/features/a/saedashboard/batch-0.json"
    done = subprocess.run(
        [python, "-c", SCRIPT, MODEL, tmp_path / "sweep/trials/a/final",
         tmp_path / "tokens.safetensors", ours_at, tmp_path / "theirs.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        json.loads(ours_at.read_text()),
        json.loads((tmp_path / "theirs.json").read_text()),
    )
    data = feature_data.read(place)
    assert len(ours["features"]) == len(theirs["features"]) == int((data.fired > 0).sum()) > 50
    assert ours.keys() == theirs.keys()
    for mine, yours in zip(ours["features"], theirs["features"], strict=True):
        assert mine.keys() == yours.keys()
        j = mine["feature_index"]
        assert j == yours["feature_index"]
        # Their density is read off a title with three decimals of a percentage.
        assert mine["frac_nonzero"] == pytest.approx(yours["frac_nonzero"], abs=2e-5)
        for end, name in (("pos", "top"), ("neg", "bottom")):
            logits = np.array(mine[f"{end}_values"])
            np.testing.assert_allclose(logits, yours[f"{end}_values"], rtol=2e-3, atol=2e-3)
            # The same tokens, but where two logits are as good as equal.
            ids = [str(e.token) for e in data.effects(j, name)]
            assert sum(a == b for a, b in zip(ids, yours[f"{end}_str"], strict=True)) >= 8
        top, first = mine["activations"][0], yours["activations"][0]
        assert top.keys() == {key for key in first if not key.startswith("dfa_")}
        assert (top["bin_min"], top["bin_contains"]) == (first["bin_min"], first["bin_contains"])
        assert top["bin_max"] == pytest.approx(first["bin_max"], rel=2e-3, abs=2e-3)
        assert len(top["tokens"]) - len(first["tokens"]) in (0, 1)  # a BOS that is the peak
        cut = len(top["tokens"]) - len(first["tokens"])
        np.testing.assert_allclose(top["values"][cut:], first["values"], rtol=5e-3, atol=5e-3)
        assert sum(mine["freq_hist_data_bar_heights"]) == int(data.fired[j])
