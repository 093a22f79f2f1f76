"""Starting from an SAE that is there: the same function, or a refusal that says why."""

import pytest
import torch
from support.published import CPU, config_of, trained

from saeray.cluster.options import options_of
from saeray.errors import ConfigError
from saeray.files.checkpoint import save_final
from saeray.files.init_from import started_from
from saeray.files.storage import Folder
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer


def config(architecture, folder=None, **changes):
    return config_of(architecture, init_from=folder and str(folder), **changes)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_it_goes_on_as_what_it_was(tmp_path, architecture, decoder_norm, scale):
    before = trained(tmp_path, architecture)
    c = config(architecture, tmp_path, decoder_norm=decoder_norm)
    options = options_of(c, CPU, 4)
    t = SAETrainer(started_from(c, 4, options, scale), options, scale)
    x = torch.randn(100, 4)
    assert (before.encode(x) > 0).any()
    torch.testing.assert_close(t.published(x), before(x), rtol=1e-4, atol=1e-5)


def test_another_architecture_takes_the_weights(tmp_path):
    before = trained(tmp_path, "standard")
    for architecture in ("topk", "batchtopk", "jumprelu"):
        c = config(architecture, tmp_path, decoder_norm="free")
        sae = started_from(c, 4, options_of(c, CPU, 4))
        assert torch.equal(sae.W_enc, before.W_enc) and torch.equal(sae.b_dec, before.b_dec)
    assert sae.threshold.tolist() == pytest.approx([0.01] * 16)


def test_what_cannot_be_is_refused(tmp_path):
    trained(tmp_path / "sae", "standard")
    with pytest.raises(ConfigError, match=r"init_from = .*there is no such folder: cfg.json"):
        started_from(config("standard", tmp_path / "nothing"), 4)
    with pytest.raises(
        ConfigError, match="d_in and d_sae are 4 and 16, those of this sweep 4 and 32"
    ):
        started_from(config("standard", tmp_path / "sae", expansion_factor=8), 4)
    with pytest.raises(ConfigError, match="is a standard SAE; gated ones start from gated"):
        started_from(config("gated", tmp_path / "sae"), 4)


OUT = "blocks.2.hook_mlp_out"


def transcoder(architecture, folder=None, **changes):
    return config(architecture, folder, **dict(hook_point_out=OUT) | changes)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_a_transcoder_goes_on_as_what_it_was(tmp_path, architecture, decoder_norm, scale):
    c = transcoder(architecture, recipe="sae_lens", skip_connection=True)
    options = options_of(c, CPU, 4)
    sae = initial_sae(
        4, 16, seed=0, b_dec=torch.ones(4), dtype=torch.float32, decoder_init_norm=0.5,
        architecture=ARCHITECTURES[architecture], options=options, b_dec_out=torch.ones(3),
        skip=True,
    )  # fmt: skip
    t = SAETrainer(sae, options)
    for i in range(5):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(i))
        PackStep().step([t], [(x, x[:, 1:].abs())])
    save_final(Folder.at(tmp_path), c, t)
    again = transcoder(architecture, tmp_path, decoder_norm=decoder_norm, skip_connection=True)
    options = options_of(again, CPU, 4)
    sae = started_from(again, 4, options, scale, d_out=3, of_output=2.0)
    on = SAETrainer(sae, options, scale, 2.0).published
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(on(x), t.published(x), rtol=1e-5, atol=1e-5)


def test_what_a_transcoder_can_not_start_from(tmp_path):
    trained(tmp_path / "sae", "standard")
    with pytest.raises(ConfigError, match="is an SAE, and this is to be a transcoder"):
        started_from(transcoder("standard", tmp_path / "sae"), 4)
    c = transcoder("standard", recipe="sae_lens", skip_connection=True)
    options = options_of(c, CPU, 4)
    sae = initial_sae(
        4, 16, seed=0, b_dec=torch.ones(4), dtype=torch.float32, b_dec_out=torch.ones(3), skip=True
    )
    save_final(Folder.at(tmp_path / "skip"), c, SAETrainer(sae, options))
    with pytest.raises(ConfigError, match="skip_connection: true"):
        started_from(transcoder("standard", tmp_path / "skip"), 4, d_out=3)
    with pytest.raises(ConfigError, match="writes 3 numbers"):
        started_from(transcoder("standard", tmp_path / "skip"), 4, d_out=5)
    with pytest.raises(ConfigError, match="is a transcoder, and this is to be an SAE"):
        started_from(config("standard", tmp_path / "skip"), 4)
