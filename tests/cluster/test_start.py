"""What an SAE and a transcoder start from: each hook point's own middle and scale."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.bundled import HOOK
from support.configs import short_run

from saeray.cluster import start
from saeray.cluster.options import options_of
from saeray.spec.messages import NOTHING

OUT = "blocks.2.hook_mlp_out"
WIDTHS = {HOOK: 16, OUT: 9}
MEAN_NORM = {HOOK: 2.0, OUT: 6.0}


@pytest.fixture
def plan(monkeypatch):
    def statistic(hook_point, name, n_rows, seed):
        if name == "mean_norm":
            return np.array([MEAN_NORM[hook_point]], np.float32)
        return np.full(WIDTHS[hook_point], 0.5 if hook_point == HOOK else -1.0, np.float32)

    monkeypatch.setattr(start.waiting, "poll", lambda ask, limit, who: ask())
    buffer = SimpleNamespace(statistic=SimpleNamespace(remote=statistic))
    return NOTHING.__class__(**{**vars(NOTHING), "widths": WIDTHS, "buffer": buffer})


def started(plan, **fields):
    config = short_run(b_dec_init_method="mean", expansion_factor=2, **fields)
    options = options_of(config, torch.device("cpu"), WIDTHS[HOOK])
    return start.started(config, options, plan, torch.device("cpu"), 1.0)


def test_a_transcoder_starts_in_the_middle_of_both(plan):
    t = started(plan, hook_point_out=OUT, skip_connection=True)
    assert t.sae.b_dec.tolist() == [0.5] * 16 and t.sae.b_dec_out.tolist() == [-1.0] * 9
    assert (t.sae.d_in, t.sae.d_sae, t.sae.d_out) == (16, 32, 9)
    assert t.sae.W_skip.shape == (16, 9) and not t.sae.W_skip.any()
    assert (t.activation_scale, t.output_scale) == (1.0, 1.0)
    sae = started(plan).sae
    assert sae.b_dec.tolist() == [0.5] * 16 and not sae.is_transcoder


def test_each_is_scaled_to_its_own_mean_norm(plan):
    t = started(plan, hook_point_out=OUT, normalize_activations="expected_average")
    assert (t.activation_scale, t.output_scale) == (4 / 2.0, 3 / 6.0)  # √16, √9 over the norms
    assert t.sae.b_dec.tolist() == [1.0] * 16 and t.sae.b_dec_out.tolist() == [-0.5] * 9
    published = t.published
    assert not published.b_dec.any() and published.b_dec_out.tolist() == [-1.0] * 9
