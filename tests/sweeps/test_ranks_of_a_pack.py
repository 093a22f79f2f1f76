"""A sweep whose packs have several ranks."""

import pytest
import torch

import saeray
from saeray.sae.architectures.base import PARAMETERS

# Sums over two ranks are added in another order.
TOLERANCE = dict(rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_sweep_of_two_ranks(alone, tiny, tmp_path):
    ranks = dict(resources=dict(num_workers=2), eval_every=8, n_checkpoints=2)
    two = saeray.sweep(tiny | ranks, name="two", storage_path=tmp_path, live=False)
    assert two.ok
    assert two.status.harvested_tokens == 16 * 1024
    (row,), (other,) = two.rows, alone.rows
    mine, theirs = two.load(row["trial"]), alone.load(other["trial"])
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), **TOLERANCE)
    assert row["ce_loss_score"] == pytest.approx(other["ce_loss_score"], rel=1e-3)
    log = (tmp_path / "two" / "trials" / row["trial"] / "metrics.jsonl").read_text()
    assert len(log.splitlines()) == 4  # one rank reports, not two
