"""What sae_lens makes of a sweep's folder, in an environment of its own (it needs another
transformer_lens). Slow: the environment is made at the first run."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bundled import ROOT
from support.configs import short_run
from support.peers_python import python_with

import saeray
from saeray.cluster.options import options_of
from saeray.files.checkpoint import save_final
from saeray.files.storage import Folder
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

sys.path.insert(0, str(ROOT / "benchmarks"))

SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
x = load_file(sys.argv[2])["x"]
y = {"x_hat": sae(x), "f": sae.encode(x)}
save_file({k: v.detach().contiguous() for k, v in y.items()}, sys.argv[3])
told = {"hook": sae.cfg.metadata.hook_name, "d_sae": sae.cfg.d_sae}
if sae.cfg.architecture().endswith("transcoder"):
    told |= {"out": sae.cfg.metadata.hook_name_out, "d_out": sae.cfg.d_out}
print("RESULT", json.dumps(told))
"""


@pytest.fixture(scope="module")
def python():
    """Of an environment that has sae_lens."""
    return python_with("sae_lens")


def in_sae_lens(python, sae, x, tmp_path):
    """(what sae_lens says of the SAE in a folder, {"x_hat", "f"} of x there)."""
    save_file({"x": x}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [python, "-c", SCRIPT, sae, tmp_path / "x.safetensors", tmp_path / "y.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1]), load_file(tmp_path / "y.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_final_loads_in_sae_lens_with_the_same_reconstruction(tiny, tmp_path, python):
    result = saeray.sweep(tiny, name="s", storage_path=tmp_path, live=False)
    (row,) = result.rows
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 3
    told, theirs = in_sae_lens(python, row["path"], x, tmp_path)
    assert told == {"hook": "blocks.2.hook_resid_pre", "d_sae": 256}
    ours = result.load(row["trial"])
    torch.testing.assert_close(theirs["f"], ours.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "fields",
    [
        dict(architecture="p_anneal"),
        dict(architecture="gated"),
        dict(architecture="topk", k=5),
        dict(architecture="topk", k=5, decoder_norm="unit"),
        dict(architecture="batchtopk", k=4.5),
        dict(architecture="matryoshka", k=5),
        dict(architecture="jumprelu", l0_coefficient=1e-2),
    ],
)
def test_every_architecture_computes_the_same_in_sae_lens(tmp_path, python, fields):
    config = short_run(normalize_activations="expected_average", **fields)
    options = options_of(config, torch.device("cpu"), 32)
    sae = initial_sae(
        32, 128, seed=0, b_dec=torch.zeros(32), dtype=torch.float32, decoder_init_norm=0.5,
        architecture=ARCHITECTURES[config.architecture], options=options,
    )  # fmt: skip
    t = SAETrainer(sae, options, 0.7)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * 3
    for _ in range(10):
        PackStep().step([t], x)
    save_final(Folder.at(tmp_path / "final"), config, t)
    _, theirs = in_sae_lens(python, tmp_path / "final", x, tmp_path)
    f = saeray.load_sae(tmp_path / "final").encode(x)  # rows of norm 1, where the rule allows it
    assert torch.equal(f > 0, t.published.encode(x) > 0)
    assert 0 < (f > 0).sum() < f.numel()
    torch.testing.assert_close(theirs["f"], f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], t.published(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        dict(architecture="standard"),
        dict(architecture="p_anneal"),
        dict(architecture="jumprelu", l0_coefficient=1e-2),
        dict(architecture="batchtopk", k=4.5),
        dict(architecture="matryoshka", k=5, decoder_norm="unit"),
    ],
)
def test_transcoders_compute_the_same_in_sae_lens(tmp_path, python, fields, skip):
    """Those that it has: of topk and gated it has none."""
    out = "blocks.2.hook_mlp_out"
    config = short_run(hook_point_out=out, skip_connection=skip, **fields)
    options = options_of(config, torch.device("cpu"), 32)
    sae = initial_sae(
        32, 128, seed=0, b_dec=torch.randn(32), dtype=torch.float32, decoder_init_norm=0.5,
        architecture=ARCHITECTURES[config.architecture], options=options, skip=skip,
        b_dec_out=torch.randn(24),
    )  # fmt: skip
    t = SAETrainer(sae, options, 0.7, 1.9)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * 3
    for _ in range(10):
        PackStep().step([t], [(x, x[:, :24].abs())])
    save_final(Folder.at(tmp_path / "final"), config, t)
    told, theirs = in_sae_lens(python, tmp_path / "final", x, tmp_path)
    assert (told["out"], told["d_out"]) == (out, 24)
    f = saeray.load_sae(tmp_path / "final").encode(x)  # rows of norm 1, where the rule allows it
    assert torch.equal(f > 0, t.published.encode(x) > 0)
    assert 0 < (f > 0).sum() < f.numel()
    torch.testing.assert_close(theirs["f"], f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], t.published(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("hook", "joined_there"), [("hook_z", True), ("hook_q", False)])
def test_heads_are_one_vector_in_sae_lens_too(tmp_path, python, hook, joined_there):
    config = short_run(hook_point=f"blocks.2.attn.{hook}")
    sae = initial_sae(32, 64, seed=0, b_dec=torch.randn(32), dtype=torch.float32)
    save_final(
        Folder.at(tmp_path / "final"),
        config,
        SAETrainer(sae, options_of(config, torch.device("cpu"), sae.d_in)),
    )
    x = torch.randn(2, 8, 4, 8, generator=torch.Generator().manual_seed(0))  # 4 heads of 8
    given = x if joined_there else x.flatten(2)
    _, theirs = in_sae_lens(python, tmp_path / "final", given, tmp_path)
    assert theirs["x_hat"].shape == given.shape
    torch.testing.assert_close(theirs["f"], sae.encode(x.flatten(2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        theirs["x_hat"], sae(x.flatten(2)).view_as(given), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_figures_are_those_of_sae_lens_on_the_same_tokens(tmp_path, python):
    import evals

    saes = evals.trained(tmp_path)
    for excluded in ((), (0, 257)):  # BOS, and a token of the text
        mine, windows = evals.ours(saes, 16, excluded)
        others = evals.theirs(saes, windows, tmp_path, excluded)
        for ours, theirs in zip(mine, others, strict=True):
            assert 1 < ours["metrics/l0"] < 400
            for key, name in evals.NAMES.items():
                assert ours[key] == pytest.approx(theirs["scalars"][name], rel=0.01), key
            density = ours["features"]["density"].tolist()
            assert density == pytest.approx(theirs["density"], abs=1e-3)
