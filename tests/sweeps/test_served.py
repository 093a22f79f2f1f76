"""A sweep that leaves rows out, on real Ray: the SAE has seen these rows, in this order, and the
figures and files say so.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.running import weights_of

import saeray
from saeray.cluster.options import options_of
from saeray.files.sweep_folder import SweepFolder
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.standard import with_unit_rows
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.ranks import Ranks
from saeray.sae.trainer import SAETrainer
from saeray.spec.plan import plan_stream
from saeray.stream.harvester import Harvester
from saeray.stream.token_server import TokenServer

BOS, D_IN = 0, 128


def windows_of_block(text, first):
    """As many windows as it takes for 15 times 40 rows that are no BOS, from one on."""
    n = 15
    while (text.train(first, n)[:, 1:41] != BOS).sum() < 15 * 40:
        n += 1
    return text.train(first, n)


def rows_in_order(config):
    """The rows of the stream, made here from the text, and how many LM tokens that took."""
    order = plan_stream(config, [config.hook_point], {config.hook_point: D_IN}).order
    assert order.block_rows == 15 * 40  # store_batch_size is 16
    text = TokenServer(config.to_dict()).open()
    harvester = Harvester(config.to_dict(), [config.hook_point])
    first, blocks = 0, []
    for b in range(order.n_blocks):
        windows = windows_of_block(text, first)
        blocks.append(harvester.harvest(b, windows)[1])
        first += len(windows)
    rows = np.concatenate(blocks)
    at = [order.order(w) for w in range(order.n_windows)]
    mixed = [rows[w.block * order.block_rows + w.row] for w in at]
    return torch.from_numpy(np.concatenate(mixed)), first * config.context_size


def trained_here(config, x):
    options = options_of(config, torch.device("cpu"), D_IN)
    sae = initial_sae(
        D_IN, config.d_sae(D_IN), seed=config.seed, b_dec=torch.zeros(D_IN), dtype=torch.float32,
        encoder_init=config.encoder_init, encoder_init_scale=config.encoder_init_scale,
        decoder_init_norm=config.decoder_init_norm, architecture=ARCHITECTURES["standard"],
        options=options,
    )  # fmt: skip
    trainer, step = SAETrainer(sae, options), PackStep(1, Ranks(0, 1))
    for batch in x.split(config.train_batch_size)[: config.steps]:
        step.step([trainer], [(batch,)], want_metrics=False)
    return with_unit_rows(trainer.published)  # as it is saved


@pytest.mark.slow
def test_an_sae_sees_the_rows_that_are_left_and_no_others(ray_instance, tiny, tmp_path):
    left_out = dict(exclude_special_tokens=["<|endoftext|>"], context_slice=[1, 40])
    fields = left_out | dict(b_dec_init_method="zeros", resources=dict(harvesters=2))
    result = saeray.sweep(tiny | fields, name="some", storage_path=tmp_path, live=False)
    (config,) = SweepFolder(result.folder, "some").read_configs().values()
    x, n_tokens = rows_in_order(config)
    assert len(x) == -(-16 * 1024 // 600) * 600 and config.steps == 16
    assert save(tensors_of(trained_here(config, x))) == weights_of(result)

    assert result.status.harvested_tokens == n_tokens
    said = f"one SAE trained on 16,384 ({n_tokens / 16_384:.3f}x)"
    assert said in result.summary() and n_tokens > 16_384 * 64 / 40
    assert "rows at positions 1 to 40 of 0 to 63 alone: 1.600 LM" in result.status.placement
    assert "no rows of tokens '<|endoftext|>'" in result.status.placement
    trial = result.folder / "trials" / result.rows[0]["trial"]
    metadata = json.loads((trial / "final").read("cfg.json"))["metadata"]
    assert metadata["seqpos_slice"] == [1, 41]  # sae_lens's end is not served
    assert metadata["exclude_special_tokens"] == [BOS]
    held_out = TokenServer(config.to_dict()).held_out()
    last = json.loads(trial.read("metrics.jsonl").splitlines()[-1])
    assert last["eval/n_tokens"] == (held_out[:, 1:41] != BOS).sum()


def tensors_of(sae):
    return {n: t.detach().contiguous() for n, t in sae.sae_lens_tensors().items()}
