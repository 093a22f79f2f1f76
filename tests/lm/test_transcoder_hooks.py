"""A transcoder's two hook points in a real model: read in one place and put in the other."""

import pytest
import torch

from saeray.errors import ConfigError
from saeray.lm.evaluate import Evaluator
from saeray.lm.model import LanguageModel
from saeray.sae.initial import initial_sae
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.stream.check import check_config

READ, WRITTEN = "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_in"  # the same values, one later


def opened(tiny, **changes):
    config = LanguageModelSAERunnerConfig(**(tiny | dict(hook_point=READ) | changes))
    return config, LanguageModel(config, list(config.hooks_read))


@pytest.mark.parametrize("read", [READ, "blocks.1.ln2.hook_normalized"])
def test_what_is_made_of_one_is_put_in_the_place_of_the_other(tiny, read):
    """On the fast path, and on TransformerLens's own."""
    config, model = opened(tiny, hook_point=read, hook_point_out=WRITTEN)
    check_config(config, model.facts)
    assert model.facts.computed == (read, WRITTEN)
    assert model.facts.fast_path is (read == READ)
    sae = initial_sae(128, 64, seed=0, b_dec=torch.zeros(128), dtype=torch.float32,
                      b_dec_out=torch.zeros(128), skip=True)  # fmt: skip
    sae.W_dec.zero_()
    norm = model.model.get_submodule("transformer.h.1.ln_2")
    gain = norm.weight if read != READ else torch.ones(128)
    sae.W_skip.copy_(torch.diag(gain))
    if read != READ:
        sae.b_dec_out.copy_(norm.bias)
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(model, tokens)
    perfect = evaluator.evaluate(sae, read, WRITTEN)
    assert perfect["metrics/fvu"] == pytest.approx(0, abs=1e-6)
    assert perfect["metrics/CE_loss_score"] == pytest.approx(1, abs=1e-4)
    sae.W_skip.zero_()
    sae.b_dec_out.zero_()
    nothing = evaluator.evaluate(sae, read, WRITTEN)
    assert nothing["metrics/CE_loss_score"] == pytest.approx(0, abs=1e-4)
    assert nothing["metrics/ce_loss_with_ablation"] == perfect["metrics/ce_loss_with_ablation"]


def test_what_comes_before_or_is_not_there_is_refused(tiny):
    config, model = opened(tiny, hook_point=WRITTEN, hook_point_out=READ)
    with pytest.raises(ConfigError, match=rf"hook_point_out.*computes it before {WRITTEN}"):
        check_config(config, model.facts)
    with pytest.raises(ConfigError, match=r"hook_point_out = 'blocks.9.*no such hook"):
        opened(tiny, hook_point_out="blocks.9.hook_mlp_out")
