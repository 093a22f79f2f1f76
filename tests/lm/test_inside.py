"""SAEs inside their language model: spliced in, or read only."""

import pytest
import torch
from support.bundled import HOOK, MODEL

import saeray
from saeray.errors import ConfigError
from saeray.sae.architectures.standard import StandardSAE

TEXT = "def area(radius):\n    return"


def made(hook=HOOK, keeps=1.0, d=128, **metadata):
    """An SAE whose reconstruction is `keeps` times x: a feature for each direction and sign."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae = StandardSAE(both.t().contiguous(), keeps * both, torch.zeros(2 * d), torch.zeros(d))
    sae.cfg = saeray.SAECfg.of(sae, model_name=str(MODEL), hook_name=hook, **metadata)
    return sae


@pytest.fixture(scope="module")
def model():
    hooks = (HOOK, "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")
    return saeray.language_model([made(h) for h in hooks])


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.attn.hook_z"])
def test_a_perfect_sae_changes_nothing_and_a_silent_one_is_zeros(model, hook):
    with saeray.spliced(made(hook), model) as inside:
        logits, f = inside(TEXT), inside.latents
        tokens = inside.tokens(TEXT)
        assert tokens[0, 0] == model.bos and logits.shape[:2] == tokens.shape == f.shape[:2]
    plain = model.logits(tokens)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    x = model.activations(tokens)[hook]
    torch.testing.assert_close(f[0], made(hook).encode(x), rtol=1e-4, atol=1e-4)
    with saeray.spliced(made(hook, keeps=0.0), model) as inside:
        zeroed, loss = inside(tokens), inside.loss(TEXT)
    torch.testing.assert_close(zeroed, model.logits(tokens, {hook: torch.zeros_like}))
    # The mean cross-entropy of what follows, by hand.
    following = zeroed[0, :-1].log_softmax(-1)[range(len(tokens[0]) - 1), tokens[0, 1:]]
    assert loss == pytest.approx(-following.mean().item(), rel=1e-5)
    # Once it is over, the model is as it was.
    torch.testing.assert_close(model.logits(tokens), plain, rtol=0, atol=0)


def test_latents_alone_leave_the_model_as_it_is(model):
    sae = made(keeps=0.0)
    tokens = torch.arange(1, 9)
    x = model.activations(tokens.unsqueeze(0))[HOOK]
    torch.testing.assert_close(saeray.latents(sae, tokens, model)[0], sae.encode(x))
    with saeray.spliced(sae, model, reconstruction=False) as inside:
        torch.testing.assert_close(inside(tokens), model.logits(tokens.unsqueeze(0)))
        generated = inside.model.generate(inside.tokens(tokens), max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 10)


def test_one_that_writes_behind_where_it_reads(model):
    reads, writes = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    sae = made(reads, hook_name_out=writes)
    with saeray.spliced(sae, model) as inside:
        logits, tokens, f = inside(TEXT), inside.tokens(TEXT), inside.latents
    x = model.activations(tokens)[reads]
    torch.testing.assert_close(f[0], sae.encode(x))
    wanted = model.logits(tokens, {writes: lambda _: x.unsqueeze(0)})
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_where_the_fast_path_has_no_place_for_the_hook():
    sae = made("blocks.1.hook_resid_mid")
    lm = saeray.language_model(sae)
    lm_slow = saeray.language_model([sae, made("blocks.1.attn.hook_q")])
    assert lm.hooks is not None and lm_slow.hooks is None
    with saeray.spliced(sae, lm) as fast, saeray.spliced(sae, lm_slow) as slow:
        torch.testing.assert_close(slow(TEXT), fast(TEXT), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(slow.latents, fast.latents, rtol=1e-3, atol=1e-3)


def test_what_can_not_be_spliced_is_said(model):
    with pytest.raises(ConfigError, match="its cfg does not say which hook_name"):
        saeray.language_model(StandardSAE(*(torch.zeros(s) for s in ((2, 2), (2, 2), 2, 2))))
    with pytest.raises(ConfigError, match=r"hook_name = 'blocks.0.hook_resid_pre': the model was"):
        saeray.latents(made("blocks.0.hook_resid_pre"), TEXT, model)
    with saeray.spliced(made(), model) as inside, pytest.raises(ConfigError, match="at most 256"):
        inside(torch.zeros(300, dtype=torch.int64))
    with (
        saeray.spliced(made(), model) as inside,
        pytest.raises(ConfigError, match=r"text = \['a', 'b'\]: one text, or token ids"),
    ):
        inside(["a", "b"])
    sae = made(training_config={"trust_remote_code": True})
    assert not saeray.language_model(sae).config.trust_remote_code  # whoever wrote the cfg.json
    sae.cfg = saeray.SAECfg.of(sae, model_name="synthetic:d_in=128", hook_name="x")
    with pytest.raises(ConfigError, match="there is no language model behind it"):
        saeray.language_model(sae)
