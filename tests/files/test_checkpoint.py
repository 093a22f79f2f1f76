"""Checkpoints: whole or not at all, readable by sae_lens, and gone on from bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load
from support.configs import short_run

from saeray.cluster.options import options_of
from saeray.files.checkpoint import (
    load_sae,
    newest_checkpoint,
    save_checkpoint,
    save_final,
    taken,
)
from saeray.files.storage import Folder
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer
from saeray.spec.messages import SpecialTokens

CPU = torch.device("cpu")


def trained(c, steps=3, scale=1.0):
    options = options_of(c, CPU, 4)
    sae = initial_sae(
        4, 16, seed=0, b_dec=torch.zeros(4), dtype=torch.float32, decoder_init_norm=0.5,
        architecture=ARCHITECTURES[c.architecture], options=options,
    )  # fmt: skip
    trainer = SAETrainer(sae, options, scale)
    for i in range(steps):
        PackStep().step([trainer], torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
    return trainer


@pytest.mark.parametrize("in_place", [False, True])
def test_a_copy_of_an_earlier_step_is_written_as_it_was_then(tmp_path, in_place):
    """As of an SAE that Tune has stopped while it trained on."""
    c, place = short_run(), Folder.at(tmp_path)
    t = trained(c)
    then = taken(t, in_place)
    PackStep().step([t], torch.randn(8, 4))
    for name, of in (("then", then), ("again", trained(c))):
        save_checkpoint(place / name / "checkpoint", c, of)
        save_final(place / name / "final", c, of)
    for file in (place / "then").files():
        assert (place / "then").read(file) == (place / "again").read(file), file


def test_the_files_sae_lens_reads(tmp_path):
    c = short_run(seed=3)
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
    assert torch.equal(load_sae(str(tmp_path / "final"))(x), t.final(x))
    torch.testing.assert_close(t.final(x), t.sae(x))


@pytest.mark.parametrize(
    ("hook", "reshaped"), [("hook_z", "hook_z"), ("hook_q", "none"), ("o.hook_in", "none")]
)
def test_sae_lens_is_told_to_join_the_heads_of_hook_z_alone(tmp_path, hook, reshaped):
    c = short_run(hook_point=f"blocks.2.attn.{hook}")
    save_final(Folder.at(tmp_path), c, trained(c))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["reshape_activations"] == reshaped


def test_the_token_that_began_every_window_is_named(tmp_path):
    c = short_run()
    save_checkpoint(Folder.at(tmp_path / "1"), c, trained(c), SpecialTokens(7, "<eos>"))
    save_final(Folder.at(tmp_path / "2"), c.replace(prepend_bos=False), trained(c), None)
    said = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"] for name in ("1", "2")
    ]
    keys = ("prepend_bos", "bos_token", "bos_token_id")
    assert [[m[k] for k in keys] for m in said] == [[True, "<eos>", 7], [False, None, None]]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("recipe", ["guide", "anthropic-april"])
def test_a_checkpoint_continues_bit_for_bit(tmp_path, recipe, scale):
    c = short_run(use_ghost_grads=True, dead_feature_window=1, recipe=recipe)
    whole, t = trained(c, 6, scale), trained(c, 3, scale)
    folder = Folder.at(tmp_path)
    save_checkpoint(folder / "24", c, t)
    found, _ = newest_checkpoint(folder)
    resumed = found.trainer(options_of(c, CPU, 4), CPU)
    for i in range(3, 6):
        PackStep().step([resumed], torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(resumed.sae, name), getattr(whole.sae, name))
    # What others load is the SAE of activations as they are.
    x = torch.randn(5, 4)
    torch.testing.assert_close(load_sae(folder / "24").encode(x), t.sae.encode(x * scale))


ARCHITECTURE_FIELDS = {
    "standard": {}, "p_anneal": {"p_updates": 3}, "gated": {}, "topk": {"k": 3},
    "batchtopk": {"k": 2.5}, "matryoshka": {"k": 3, "matryoshka_widths": "4,8"},
    "jumprelu": {"l0_coefficient": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_on_from_its_files_and_is_loaded(tmp_path, architecture, scale):
    c = short_run(architecture=architecture, **ARCHITECTURE_FIELDS[architecture])
    whole, t = trained(c, 6, scale), trained(c, 3, scale)
    save_checkpoint(Folder.at(tmp_path) / "24", c, t)
    found, _ = newest_checkpoint(Folder.at(tmp_path))
    resumed = found.trainer(options_of(c, CPU, 4), CPU)
    for i in range(3, 6):
        PackStep().step([resumed], torch.randn(8, 4, generator=torch.Generator().manual_seed(i)))
    for name, tensor in whole.sae.tensors.items():
        assert torch.equal(resumed.sae.tensors[name], tensor)
    save_final(Folder.at(tmp_path) / "final", c, whole)
    x = torch.randn(50, 4)
    loaded = load_sae(Folder.at(tmp_path) / "final")
    assert torch.equal(loaded(x), whole.final(x)) and (loaded.encode(x) > 0).any()
    torch.testing.assert_close(loaded(x), whole.published(x))
    cfg = json.loads((tmp_path / "final" / "cfg.json").read_text())
    kinds = {"p_anneal": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}
    assert cfg["architecture"] == kinds.get(architecture, architecture)
    assert cfg["metadata"]["training_config"]["architecture"] == architecture


@pytest.mark.parametrize("harm", ["cut off", "changed", "marker missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, harm):
    c, folder = short_run(), Folder.at(tmp_path)
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
