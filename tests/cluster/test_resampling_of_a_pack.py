"""Resampling from a pack's request to features that live, without Ray: harvesters are called."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.exceptions import ObjectLostError
from support.configs import short_run
from support.linear_model import LinearModel
from support.training import gone_on_from

from saeray.cluster import resampling
from saeray.cluster.options import options_of
from saeray.lm.rows_for_dead import rows_for_dead
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.ranks import Ranks
from saeray.sae.trainer import SAETrainer
from saeray.spec.messages import PackPlan
from saeray.spec.order import StreamOrder

V, D, CONTEXT, STEPS, AT = 19, 6, 8, 40, 12
ORDER = StreamOrder(n_blocks=50, block_rows=4 * CONTEXT, group_blocks=2, seed=0)
DEAD = slice(2, 7)


def tokens_of(block):
    generator = torch.Generator().manual_seed(block)
    return torch.randint(0, V, (ORDER.block_rows // CONTEXT, CONTEXT), generator=generator)


class Buffer:
    """Answers at once, with the SAEs themselves for snapshots."""

    def __init__(self):
        self.model, self.asked = LinearModel("hook", V, D), []
        self.rows_for_dead = SimpleNamespace(remote=self.answer)

    def answer(self, wanted, snapshots):
        self.asked.append(wanted)
        saes = list(zip(wanted.saes, snapshots, strict=True))
        return [
            [(p.rows.numpy(), p.weights.numpy()) for p in found]
            for b in wanted.blocks
            for found in [rows_for_dead(self.model, tokens_of(b), b, saes)]
        ]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(resampling.waiting, "poll", lambda call, *_: call())
    monkeypatch.setattr(resampling.waiting, "get", lambda refs, *_: refs)


def member(method, seed):
    config = short_run(
        training_tokens=STEPS * 32, train_batch_size=32, feature_sampling_method=method,
        dead_feature_window=AT, feature_sampling_window=100, expansion_factor=4, seed=seed,
        hook_point="hook", lr=1e-3, lr_scheduler_name="constant",
    )  # fmt: skip
    sae = initial_sae(
        D, 4 * D, seed=seed, b_dec=torch.zeros(D), dtype=torch.float32,
        encoder_init="decoder_transpose",
    )  # fmt: skip
    sae.b_enc[DEAD] = -50.0
    trainer = SAETrainer(sae, options_of(config, torch.device("cpu"), D))
    return SimpleNamespace(name=f"{method}-{seed}", config=config, trainer=trainer)


def trained(members, buffer, first=0, last=STEPS):
    pack = PackStep()
    plan = PackPlan("pack", {}, "", ["hook"], {"hook": D}, ORDER, buffer, 1)
    for step in range(first, last):
        x = buffer.model.activations(tokens_of(step))["hook"]
        pack.step([m.trainer for m in members], x)
        resampling.resample(members, plan, Ranks(), 5.0, lambda m: m.trainer.published)
    return members


def weights(m):
    return [p.clone() for p in m.trainer.sae.tensors.values()]


@pytest.mark.parametrize("method", ["anthropic", "l2"])
def test_planted_dead_features_live_and_the_bytes_are_the_same_resumed_and_packed(method):
    buffer = Buffer()
    others = [member("l2", 8), member("anthropic", 9), member(None, 10)]
    (whole, *_) = trained([member(method, 7), *others], buffer)
    assert whole.trainer.n_resampled >= 5
    assert (whole.trainer.fired_in_window[DEAD] > 0).all()
    assert not (others[2].trainer.fired_in_window[DEAD] > 0).any()
    first = buffer.asked[0]
    # After 12 steps of 32 rows 12 blocks were trained on; rows come from the first 32.
    assert first.blocks == range(32)
    assert [s.name for s in first.saes] == [f"{method}-7", "l2-8", "anthropic-9"]
    assert {s.step for s in first.saes} == {AT}

    for cut in (AT - 1, AT, AT + 3):
        (half,) = trained([member(method, 7)], Buffer(), last=cut)
        half.trainer = gone_on_from(half.trainer)
        trained([half], Buffer(), first=cut)
        assert all(torch.equal(a, b) for a, b in zip(weights(half), weights(whole), strict=True))


def test_what_is_lost_is_asked_for_anew(monkeypatch):
    lost = [True, True, False]

    def get(refs, *_):
        if lost.pop(0):
            raise ObjectLostError("", "", "")
        return refs

    monkeypatch.setattr(resampling.waiting, "get", get)
    buffer = Buffer()
    (m,) = trained([member("l2", 7)], buffer, last=AT)
    assert m.trainer.n_resampled == 5
    assert [w.attempt for w in buffer.asked] == [0, 1, 2]


def test_no_more_saes_at_once_than_a_harvester_has_room_for(monkeypatch):
    members = [member("l2", seed) for seed in range(5)]
    one = sum(p.numel() * 4 for p in members[0].trainer.sae.tensors.values())
    monkeypatch.setattr(resampling, "SAES_AT_HARVESTER", 2 * one)
    assert [len(some) for some in resampling.together(members)] == [2, 2, 1]
    monkeypatch.setattr(resampling, "SAES_AT_HARVESTER", 1)
    assert [len(some) for some in resampling.together(members)] == [1] * 5
    rows, of = resampling.joined(iter([(np.ones((2, 3)), np.ones(2)), (np.zeros((1, 3)), [2.0])]))
    assert rows.shape == (3, 3) and of.tolist() == [1, 1, 2]
