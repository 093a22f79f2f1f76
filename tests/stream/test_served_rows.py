"""On the bundled model: the rows that reach an SAE are those that are served, and no others."""

import numpy as np
import pytest
import torch
from support.bundled import HOOK, fields

from saeray.lm.model import LanguageModel
from saeray.sae.architectures.base import kind_of
from saeray.sae.initial import initial_sae
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.messages import Snapshot
from saeray.stream.check import check_models
from saeray.stream.harvester import Harvester
from saeray.stream.token_server import TokenServer

BOS = 0
CONTEXT, CONTEXTS = 32, 6


def config_of(**changes):
    values = fields(context_size=CONTEXT, store_batch_size=CONTEXTS, b_dec_init_rows=64)
    return resolve(LanguageModelSAERunnerConfig(**(values | changes)))


@pytest.fixture(scope="module")
def text():
    """Windows of the training text, and the activations of all of their rows."""
    config = config_of()
    model = LanguageModel(config, [HOOK])
    server = TokenServer(config.to_dict())
    windows = server.open().train(0, 12 * CONTEXTS)
    return windows, model.activations(torch.from_numpy(windows.copy()))[HOOK].numpy()


def asked(server, block):
    """Its tokens, however slow the machine is."""
    while not isinstance(answer := server.block(block), np.ndarray):
        pass
    return answer


def harvested(config, n_blocks):
    """Blocks as they come from a token server and a harvester, and the tokens computed for each."""
    server, harvester = TokenServer(config.to_dict()), Harvester(config.to_dict(), [HOOK])
    found, computed = [], []
    for b in range(n_blocks):
        done, block = harvester.harvest(b, asked(server, b))
        found.append(block)
        computed.append(done.n_tokens)
    return found, computed


def test_no_bos_row_reaches_an_sae(text):
    windows, x = text
    config = config_of(exclude_special_tokens=True)
    blocks, computed = harvested(config, 8)
    kept = windows != BOS
    assert kept[:, 0].sum() == 0 and kept.sum() < kept.size - len(windows)  # some stand inside
    first = 0
    for block, n_tokens in zip(blocks, computed, strict=True):
        n = n_tokens // CONTEXT
        rows = np.flatnonzero(kept[first : first + n])[: 5 * CONTEXT] + first * CONTEXT
        assert block.shape == (5 * CONTEXT, 128)  # one context less than store_batch_size
        assert np.allclose(block, x[rows], atol=1e-5)
        assert int(kept[first : first + n - 1].sum()) < 5 * CONTEXT  # no window for nothing
        first += n
    # On this text nearly every block is one forward of store_batch_size contexts.
    assert computed.count(CONTEXTS * CONTEXT) >= 6
    bos = x[0]  # the same in every window that begins with it
    assert np.abs(np.concatenate(blocks) - bos).max(axis=1).min() > 1.0
    assert harvested(config, 1)[0][0].tobytes() == blocks[0].tobytes()


def test_positions_outside_the_slice_reach_none(text):
    _, x = text
    (one, two), computed = harvested(config_of(context_slice=[8, -9]), 2)
    assert computed == [CONTEXTS * CONTEXT] * 2
    x = x.reshape(-1, CONTEXT, 128)[:, 8:24]
    assert np.array_equal(one, x[:6].reshape(-1, 128))
    assert np.array_equal(two, x[6:12].reshape(-1, 128))


def test_what_is_measured_first_is_of_rows_that_are_served(text):
    config = config_of(exclude_special_tokens=True)
    harvester = Harvester(config.to_dict(), [HOOK])
    (block,), _ = harvested(config, 1)
    mean = harvester.statistic("mean_norm", 160, 3, block)
    assert mean.item() == pytest.approx(np.linalg.norm(block, axis=1).mean(), rel=1e-5)
    norms = {}
    check_models([[config]], norms)
    held_out = TokenServer(config.to_dict()).held_out()
    assert norms[config.model_name, HOOK].rows == int((held_out != BOS).sum())


def test_what_is_evaluated_is_of_rows_that_are_served():
    config = config_of(exclude_special_tokens=True, context_slice=[1, 20])
    harvester, held_out = Harvester(config.to_dict(), [HOOK]), TokenServer(config.to_dict())
    windows = held_out.held_out()
    sae = initial_sae(128, 256, seed=0, b_dec=torch.zeros(128), dtype=torch.float32)
    snapshot = Snapshot(kind_of(sae), {n: t.numpy() for n, t in sae.sae_lens_tensors().items()})
    (found,) = harvester.evaluate((HOOK,), windows, False, snapshot)
    assert found["eval/n_tokens"] == int((windows[:, 1:21] != BOS).sum())


def test_windows_are_those_of_a_stream_that_serves_all(text):
    config = config_of(exclude_special_tokens=True, context_slice=[1, 20])
    server = TokenServer(config.to_dict())
    tokens = asked(server, 0)
    assert np.array_equal(tokens, text[0][: len(tokens)])
