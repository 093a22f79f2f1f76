"""Pre-activation loss: the dead features of a JumpReLU are drawn towards their thresholds.

    pre_act_loss_coefficient · mean_B Σ_j relu(θ_j - h_j) n_j

over the dead ones (Anthropic's update of January 2025 has it for all); n_j the decoder row's norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeray.sae.architectures.rule import Rule
from saeray.sae.dead_features import OfDead, add_of_dead
from saeray.sae.gradients import Batch, Gradients, Lane, RunLanes
from saeray.sae.ranks import Ranks


def pre_act_gradients(
    rule: Rule,
    batch: Batch,
    errors: Tensor,
    dead: Tensor,
    grad: Gradients,
    run_lanes: RunLanes,
    ranks: Ranks,
) -> Tensor:
    """Adds the term's gradient for the dead features (indices, [n]); returns its value."""
    sae, norms = rule.sae, rule.step.norms
    W_enc, b_enc = sae.W_enc.t()[dead], sae.b_enc[dead]
    theta: Tensor = sae.threshold[dead]  # type: ignore[index]
    per_row = rule.options.pre_act_loss_coefficient / len(batch.x)
    weight = per_row if norms is None else norms[dead] * per_row

    def lane_pre_act(lane: Lane) -> OfDead:
        x_centred = batch.x[slice(*lane)] - sae.b_dec
        below = (theta - torch.addmm(b_enc, x_centred, W_enc.t())).clamp_min_(0)  # [rows, dead]
        total = below.sum(dim=0)
        dh = -((below > 0) * weight).to(below.dtype)
        db_enc = dh.sum(dim=0)
        extra = {"threshold": -db_enc}
        if norms is not None:
            extra["norm"] = total * per_row
        value = (total * weight).sum()
        to_dec = W_enc.new_zeros(len(dead), sae.d_out)
        return OfDead(dh.t() @ x_centred, to_dec, db_enc, value, extra)

    return add_of_dead(grad, dead, batch, lane_pre_act, run_lanes, ranks)
