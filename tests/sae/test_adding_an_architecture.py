"""The architecture of docs/adding-an-architecture.md: its step is its formula's."""

import pytest
import torch
from support.blocks import blocks_of
from support.formulas import VARIANTS, batch, stepped, trainer

from saeray.sae.architectures import ARCHITECTURES, Architecture
from saeray.sae.architectures.standard import StandardSAE


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_the_gradient_of_the_pages_example(decoder_norm, sparse, monkeypatch):
    names = {}
    exec(blocks_of("docs/adding-an-architecture.md")[0].text, names)
    monkeypatch.setitem(
        ARCHITECTURES, "log_penalty", Architecture(StandardSAE, names["LogPenalty"])
    )
    of = dict(architecture="log_penalty", l1_coefficient=0.3)
    monkeypatch.setitem(VARIANTS, "log_penalty", of)
    t = trainer("log_penalty", decoder_norm=decoder_norm)
    x = batch()
    w = {n: p.detach().clone().requires_grad_() for n, p in t.sae.tensors.items()}
    f = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    norms = w["W_dec"].norm(dim=1) if decoder_norm == "free" else 1.0
    squared = (f @ w["W_dec"] + w["b_dec"] - x).pow(2).sum(1).mean()
    loss = squared + 0.3 * torch.log(1 + f * norms).sum(1).mean()
    loss.backward()
    if decoder_norm == "unit":  # along the sphere that rows are kept on
        rows = w["W_dec"].detach()
        w["W_dec"].grad -= (w["W_dec"].grad * rows).sum(1, keepdim=True) * rows
    mine, metrics = stepped(t, x, sparse)
    for name, parameter in w.items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(mine[name] / scale, parameter.grad / scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metrics.overall, loss.detach(), rtol=1e-10, atol=0)
