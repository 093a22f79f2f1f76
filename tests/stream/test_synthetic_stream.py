"""Known features at a harvester and a token server, without Ray: each makes the same block."""

import numpy as np
import torch

from saeray.files.cache import identities_of
from saeray.sae.architectures.base import kind_of
from saeray.sae.initial import initial_sae
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.messages import CacheKey, Snapshot, SpecialTokens
from saeray.stream.harvester import Harvester
from saeray.stream.token_server import TokenBlock, TokenServer

CONFIG = resolve(
    LanguageModelSAERunnerConfig(
        model_name="synthetic:d_in=16,features=32,l0=2,noise=0.1",
        context_size=8,
        store_batch_size=4,
        eval_windows=6,
        device="cpu",
    )
)


def harvester():
    return Harvester(CONFIG.to_dict(), [CONFIG.hook_point])


def test_blocks_follow_the_held_out_rows():
    server = TokenServer(CONFIG.to_dict())
    assert server.check() == SpecialTokens(None, None)  # no BOS
    assert server.held_out().ravel().tolist() == list(range(48))
    assert server.block(0).ravel().tolist() == list(range(48, 80))
    with_place = server.block(63)  # every 64th says where the next one begins
    assert isinstance(with_place, TokenBlock)
    assert with_place.tokens[0, 0] == 48 + 63 * 32
    assert with_place.next_at.window == 64 * 4
    assert server.counts() == (1, 0, [])


def test_any_harvester_makes_the_same_block():
    one, other = harvester(), harvester()
    facts = one.check([CONFIG.to_dict()])
    assert facts.d_in == {"activations": 16}
    assert other.check_others([[CONFIG.to_dict()]]) == [facts]
    tokens = TokenServer(CONFIG.to_dict()).block(5)
    other.harvest(0, TokenServer(CONFIG.to_dict()).block(0))
    done, rows = one.harvest(5, tokens)
    assert (done.n_tokens, rows.shape, rows.dtype) == (32, (32, 16), np.float32)
    assert np.array_equal(other.harvest(5, tokens)[1], rows)


def test_the_activation_cache_has_blocks_of_it(tmp_path):
    one, other = harvester(), harvester()
    identity, _ = identities_of(CONFIG, one.fingerprints(), "cpu", {"activations": 16})
    key = CacheKey(str(tmp_path), identity)
    tokens = TokenServer(CONFIG.to_dict()).block(5)
    _, rows = one.harvest(5, tokens, key)
    one.flush()
    done, read = other.harvest(5, tokens, key)
    assert (done.n_tokens, done.cached_tokens) == (0, 32)
    assert np.array_equal(read, rows)


def test_a_snapshot_is_evaluated_against_the_ground_truth():
    sae = initial_sae(16, 40, seed=0, b_dec=torch.zeros(16), dtype=torch.float32)
    snapshot = Snapshot(kind_of(sae), {k: t.numpy() for k, t in sae.sae_lens_tensors().items()})
    held_out = TokenServer(CONFIG.to_dict()).held_out()
    (found,) = harvester().evaluate((CONFIG.hook_point,), held_out, True, snapshot)
    assert 0.2 < found["ground_truth/mcc"] < 0.9
    assert found["eval/n_tokens"] == 48
    assert "metrics/CE_loss_score" not in found
    assert found["metrics/mdl"] > 0
    assert found["features"].startswith(b"PAR1")
