"""SAEs in other packages' formats: what they hold, and what they can't.

dictionary_learning loads them in an environment of its own: slow, it is made at the first run.
"""

import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load
from support.bundled import ROOT
from support.peers_python import python_with
from support.published import trained

import saeray
from saeray.errors import ConfigError
from saeray.files.export import exported

sys.path.insert(0, str(ROOT / "benchmarks"))

ARCHITECTURES = ("standard", "p_anneal", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")


def loaded(folder, architecture, **changes):
    trained(folder, architecture, **changes)
    return saeray.load_sae(folder)


def rows(d_in):
    return torch.randn(64, d_in, generator=torch.Generator().manual_seed(0)) * 3


def state_of(files):
    return torch.load(io.BytesIO(files["ae.pt"]), weights_only=True)


@pytest.mark.parametrize(
    ("architecture", "kind", "trainer"),
    [
        ("standard", "AutoEncoder", "StandardTrainer"),
        ("p_anneal", "AutoEncoder", "PAnnealTrainer"),
        ("gated", "GatedAutoEncoder", "GatedSAETrainer"),
        ("topk", "AutoEncoderTopK", "TopKTrainer"),
        ("batchtopk", "BatchTopKSAE", "BatchTopKTrainer"),
        ("matryoshka", "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
        ("jumprelu", "JumpReluAutoEncoder", "JumpReluTrainer"),
    ],
)
def test_dictionary_learning_has_a_class_for_each(tmp_path, architecture, kind, trainer):
    sae = loaded(tmp_path / "it", architecture)
    files = exported(sae, "dictionary_learning")
    told = json.loads(files["config.json"])
    assert (told["trainer"]["dict_class"], told["trainer"]["trainer_class"]) == (kind, trainer)
    assert told["trainer"]["activation_dim"] == 4 and told["trainer"]["dict_size"] == 16
    assert (told["trainer"]["layer"], told["trainer"]["lm_name"]) == (2, "m")
    assert (told["trainer"]["steps"], told["buffer"]["ctx_len"]) == (10, 128)
    state = state_of(files)
    if architecture in ("topk", "batchtopk", "matryoshka"):
        assert told["trainer"]["k"] == int(state["k"]) == 3
    if architecture in ("standard", "p_anneal"):  # it divides by these when it loads them
        torch.testing.assert_close(state["decoder.weight"].norm(dim=0), torch.ones(16))
    if architecture == "matryoshka":
        assert sum(state["group_sizes"].tolist()) == 16
    if architecture == "jumprelu":  # it takes no b_dec off x
        x = rows(4)
        h = (x @ state["W_enc"] + state["b_enc"]).relu()
        f = h * (h > state["threshold"])
        torch.testing.assert_close(f @ state["W_dec"] + state["b_dec"], sae(x))


def test_a_feature_without_a_decoder_row_never_fires(tmp_path):
    sae = loaded(tmp_path / "it", "standard")
    with torch.no_grad():
        sae.W_dec[3] = 0.0
    state = state_of(exported(sae, "dictionary_learning"))
    x = rows(4)
    f = torch.relu((x - state["bias"]) @ state["encoder.weight"].t() + state["encoder.bias"])
    assert (f[:, 3] == 0).all()
    torch.testing.assert_close(f @ state["decoder.weight"].t() + state["bias"], sae(x))
    torch.testing.assert_close(state["decoder.weight"].norm(dim=0), torch.ones(16))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saebench_gets_unit_rows_and_what_it_asks_of_a_cfg(tmp_path, architecture):
    sae = loaded(tmp_path / "it", architecture)
    files = exported(sae, "saebench")
    cfg, tensors = json.loads(files["cfg.json"]), load(files["sae_weights.safetensors"])
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(16))
    asked = ("model_name", "hook_name", "context_size", "hook_layer")
    assert [cfg["metadata"][n] for n in asked] == ["m", "blocks.2.hook_resid_pre", 128, 2]
    (tmp_path / "out").mkdir()
    for name, data in files.items():
        (tmp_path / "out" / name).write_bytes(data)
    x = rows(4)
    torch.testing.assert_close(saeray.load_sae(tmp_path / "out")(x), sae(x))


def test_sae_lens_gets_what_is_there(tmp_path):
    sae = loaded(tmp_path / "it", "gated")
    files = exported(sae, "sae_lens")
    assert {*files} == {p.name for p in (tmp_path / "it").iterdir()}
    for name, data in files.items():
        there = (tmp_path / "it" / name).read_bytes()
        if name == "cfg.json":
            assert json.loads(data) == json.loads(there)
        else:
            theirs = load(there)
            assert all(torch.equal(t, theirs[n]) for n, t in load(data).items())


def test_what_a_format_can_not_hold_is_refused_by_name(tmp_path):
    half = loaded(tmp_path / "half", "batchtopk", k=2.5)
    with pytest.raises(ConfigError, match=r"k = 2.5: dictionary_learning's BatchTopKSAE"):
        exported(half, "dictionary_learning")
    assert exported(half, "saebench")
    double = loaded(tmp_path / "double", "standard").double()
    with pytest.raises(ConfigError, match="dtype = 'float64'"):
        exported(double, "dictionary_learning")
    for form in ("dictionary_learning", "saebench"):
        sae = loaded(tmp_path / form, "standard")
        sae.cfg.metadata["hook_name_out"] = "blocks.2.hook_mlp_out"
        with pytest.raises(ConfigError, match=r"hook_point_out = 'blocks.2.hook_mlp_out'"):
            exported(sae, form)
    heads = loaded(tmp_path / "heads", "standard", hook_point="blocks.2.attn.hook_q")
    with pytest.raises(ConfigError, match=r"hook_point = 'blocks.2.attn.hook_q'"):
        exported(heads, "saebench")
    with pytest.raises(ConfigError, match="format = 'saelens': did you mean sae_lens"):
        exported(half, "saelens")


SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from dictionary_learning.utils import load_dictionary
x = load_file(sys.argv[1])["x"]
for folder in sys.argv[2:]:
    ae, config = load_dictionary(folder, "cpu")
    save_file({"x_hat": ae(x).detach().contiguous(), "f": ae.encode(x).detach()}, folder + "/y")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dictionary_learning_computes_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    python = python_with("dictionary_learning")
    saes, folders = {}, []
    for name in ARCHITECTURES:
        saes[name] = loaded(tmp_path / name, name, d_in=32, d_sae=128)
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        for file, data in exported(saes[name], "dictionary_learning").items():
            (folder / file).write_bytes(data)
        folders.append(str(folder))
    x = rows(32)
    save_file({"x": x}, tmp_path / "x")
    done = subprocess.run(
        [python, "-c", SCRIPT, tmp_path / "x", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, sae in saes.items():
        theirs = load_file(tmp_path / "out" / name / "y")
        assert 0 < (theirs["f"] > 0).sum() < theirs["f"].numel()
        torch.testing.assert_close(theirs["x_hat"], sae(x), rtol=1e-5, atol=1e-5)
