"""What a user has of a trained SAE: the object, what it knows, and all the ways to name it."""

import copy
import json
import pickle

import pytest
import torch
from ray import tune
from safetensors.torch import save_file
from support.finished import finished, sae
from support.published import trained

import saeray
from saeray.client.result import load_sweep
from saeray.errors import ConfigError
from saeray.files import strict_json
from saeray.sae.architectures.standard import StandardSAE

HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture
def sweep(tmp_path):
    """Two SAEs that are trained, and one that is not."""
    made = finished(
        tmp_path / "mine",
        a=sae(10.0, 0.9, 0.9, W_dec=torch.eye(4), lr=1e-3),
        b=sae(20.0, 0.95, 0.95, W_dec=2 * torch.eye(4), lr=2e-3),
        c=sae(state="waiting", lr=3e-3),
    )
    return load_sweep(made.path)


def test_it_knows_what_it_is(sweep):
    loaded = sweep.load("b")
    cfg = loaded.cfg
    assert (cfg.hook_name, cfg.hook_point, cfg.model_name) == (HOOK, HOOK, "m")
    assert (cfg.architecture, cfg.name, cfg.d_in, cfg.d_sae) == ("standard", "b", 4, 4)
    assert cfg.folder == sweep.final("b").uri
    assert (cfg.lr, cfg.training_config["lr"], cfg.context_size) == (2e-3, 2e-3, 128)
    assert not hasattr(cfg, "no_such_field")
    assert cfg.sparsity.shape == (4,)
    listed = repr([sweep.load("a"), loaded])
    assert f"<SAE a: standard 4 -> 4 at {HOOK} of m, in {sweep.final('a').uri}>" in listed
    assert "<SAE b: " in listed and "\n" not in listed
    assert repr(StandardSAE(*trained_tensors())) == "<SAE: standard 2 -> 3>"


def trained_tensors():
    return torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "batchtopk", "jumprelu"])
def test_it_is_a_module_as_any_other(tmp_path, architecture):
    before = trained(tmp_path / "it", architecture)
    loaded = saeray.load_sae(tmp_path / "it", device="cpu")
    x = torch.randn(3, 5, loaded.d_in, generator=torch.Generator().manual_seed(0))
    f = loaded.encode(x)
    assert f.shape == (3, 5, loaded.d_sae) and (f > 0).any()
    torch.testing.assert_close(loaded(x), loaded.decode(f))
    torch.testing.assert_close(loaded.forward(x), before(x))
    assert {*loaded.state_dict()} == {*loaded.tensors} >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        torch.testing.assert_close(again(x), loaded(x), rtol=0, atol=0)
        assert again.cfg.architecture == architecture and repr(again) == repr(loaded)
    other = trained(tmp_path / "other", architecture, seed=1)
    other.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(other(x), loaded(x), rtol=0, atol=0)
    # Saved as it is now, beside what is there.
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    loaded.to(torch.float64).save(tmp_path / "saved")
    again = saeray.load_sae(tmp_path / "saved")
    assert again.dtype == torch.float64 and again.cfg.dtype == "float64"
    torch.testing.assert_close(again(x.double()), loaded(x.double()), rtol=0, atol=0)
    assert again.cfg.lr == loaded.cfg.lr
    assert torch.equal(again.cfg.sparsity, loaded.cfg.sparsity)
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"


def test_one_made_by_hand_is_saved_once_it_says_what_it_is_of(tmp_path):
    made = StandardSAE(*trained_tensors())
    with pytest.raises(ValueError, match=r"has no cfg.*saeray.SAECfg.of"):
        made.save(tmp_path / "made")
    made.cfg = saeray.SAECfg.of(made, model_name="gpt2", hook_name=HOOK)
    made.save(tmp_path / "made")
    again = saeray.load_sae(tmp_path / "made")
    assert (again.cfg.name, again.cfg.model_name, again.cfg.hook_point) == ("made", "gpt2", HOOK)


def test_every_way_to_name_an_sae(sweep, tmp_path):
    place = tmp_path / "mine"
    final = place / "trials" / "b" / "final"
    row = sweep.rows[1]
    (tmp_path / "tune").mkdir()
    pointer = {"name": "b", "folder": None, "path": str(final), "number": 7}
    (tmp_path / "tune" / "sae.json").write_text(strict_json.dumps(pointer))
    checkpoint = tune.Checkpoint(str(tmp_path / "tune"))
    told = {"path": str(final), "step": 3}
    results = [
        tune.Result(metrics=told, checkpoint=None, error=None, path="…"),
        tune.Result(metrics={}, checkpoint=checkpoint, error=None, path="…"),
    ]
    for where in (final, str(final), final.parent, f"{place}/b", row, checkpoint, told, *results):
        assert saeray.load_sae(where).cfg.name == "b", where
    # A Tune experiment that was moved, with its checkpoints.
    moved = place / "trial_1" / "checkpoint_000000"
    moved.mkdir(parents=True)
    pointer = {"name": "b", "folder": "/gone/mine/trials/b", "path": "/gone/mine/trials/b/final"}
    (moved / "sae.json").write_text(strict_json.dumps(pointer))
    assert saeray.load_sae(tune.Checkpoint(str(moved))).cfg.name == "b"
    only = finished(tmp_path / "only", x=sae(1.0, 0.9, 0.9, W_dec=torch.eye(4)))
    assert saeray.load_sae(only.path).cfg.name == "x"
    assert saeray.load_sae(load_sweep(only.path)).cfg.name == "x"


def test_what_names_no_sae_is_said(sweep, tmp_path):
    place = tmp_path / "mine"
    for where, said in (
        (place, r"there are 2 SAEs: a, b; .*mine/NAME takes one"),
        (sweep, r"mine: there are 2 SAEs: a, b"),
        (f"{place}/aa", "no trained SAE of that name; did you mean a"),
        (f"{place}/c", "no trained SAE of that name"),
        (sweep.rows[2], r"c: has no SAE yet \(waiting\)"),
        (tmp_path / "nowhere", "there is no such folder: cfg.json is wanted"),
        (tmp_path, "there is no such SAE: cfg.json is wanted"),
        (3, "int names no SAE"),
    ):
        with pytest.raises(ConfigError, match=said):
            saeray.load_sae(where)


def sae_lens_folder(where, tensors, **cfg):
    where.mkdir()
    (where / "cfg.json").write_text(json.dumps({"d_in": 4, "d_sae": 8, "dtype": "float32", **cfg}))
    save_file(tensors, where / "sae_weights.safetensors")


def their_tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(4, 8, generator=g), "W_dec": torch.randn(8, 4, generator=g),
        "b_enc": torch.randn(8, generator=g), "b_dec": torch.randn(4, generator=g),
    }  # fmt: skip


def test_what_older_versions_of_sae_lens_have_written(tmp_path):
    t = their_tensors()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    old = dict(hook_point=HOOK, model_name="gpt2-small", context_size=64)
    sae_lens_folder(tmp_path / "old", t, apply_b_dec_to_input=False, **old)
    loaded = saeray.load_sae(tmp_path / "old")
    f = torch.relu(x @ t["W_enc"] + t["b_enc"])  # no b_dec taken off
    torch.testing.assert_close(loaded.encode(x), f)
    torch.testing.assert_close(loaded(x), f @ t["W_dec"] + t["b_dec"])
    assert (loaded.cfg.hook_name, loaded.cfg.model_name) == (HOOK, "gpt2-small")
    # A topk that chose among latents times their rows' norms.
    sae_lens_folder(
        tmp_path / "topk", t, activation_fn_str="topk", activation_fn_kwargs={"k": 2},
        rescale_acts_by_decoder_norm=True,
    )  # fmt: skip
    norms = t["W_dec"].norm(dim=1)
    scaled = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    top = torch.zeros_like(scaled).scatter(-1, *reversed(scaled.topk(2, dim=-1)))
    loaded = saeray.load_sae(tmp_path / "topk")
    torch.testing.assert_close(loaded.encode(x), top)
    torch.testing.assert_close(loaded(x), (top / norms) @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("cfg", "extra", "said"),
    [
        (dict(normalize_activations="layer_norm"), {}, "normalize_activations = 'layer_norm'"),
        (dict(architecture="temporal"), {}, "'temporal': one of standard"),
        ({}, dict(scaling_factor=torch.full((8,), 2.0)), "scaling_factor: its latents"),
    ],
)
def test_what_ours_can_not_compute_is_refused_by_name(tmp_path, cfg, extra, said):
    sae_lens_folder(tmp_path / "it", their_tensors() | extra, **cfg)
    with pytest.raises(ConfigError, match=said):
        saeray.load_sae(tmp_path / "it")
