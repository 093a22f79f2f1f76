"""Ghost gradients: dead features learn to predict what the living leave unexplained.

Anthropic's update of January 2024; `losses.ghost_loss` is the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeray.sae.architectures.rule import Rule
from saeray.sae.dead_features import OfDead, add_of_dead
from saeray.sae.gradients import Batch, Gradients, Lane, RunLanes
from saeray.sae.losses import EPSILON, mse_normaliser
from saeray.sae.ranks import Ranks


def ghost_gradients(
    rule: Rule,
    batch: Batch,
    errors: Tensor,
    dead: Tensor,
    grad: Gradients,
    run_lanes: RunLanes,
    ranks: Ranks,
) -> Tensor:
    """Adds the ghost term's gradient for the dead features (indices, [n]); returns its value.

    With r = x - x̂, E = exp(h[:, dead]) (divided by the row's largest one, which s cancels), s the
    row's scale to half of ‖r‖ and c the elementwise rescaling to the squared error (both
    constants), g = s E W_dec[dead]:

        dg = 2 c (g - r) / (n_r B D) · s       dW_dec[dead] = Eᵀ dg
        dh = (dg W_dec[dead]ᵀ) · E             dW_enc[:, dead] = (x - b_dec)ᵀ dh, and so on
    """
    sae, normalization = rule.sae, rule.options.mse_normalization
    W_enc, W_dec, b_enc = sae.W_enc.t()[dead], sae.W_dec[dead], sae.b_enc[dead]
    normaliser = mse_normaliser(errors, normalization)  # of r = -errors: the same norm
    per_element = batch.weight / errors.numel()

    def lane_ghost(lane: Lane) -> OfDead:
        rows = slice(*lane)
        residual, x_centred = -errors[rows], batch.x[rows] - sae.b_dec
        h = torch.addmm(b_enc, x_centred, W_enc.t())  # [rows, dead]
        highest = h.amax(dim=1, keepdim=True).clamp_min_(0)
        E = h.sub_(highest).exp_()
        g = E @ W_dec
        scale = torch.linalg.vector_norm(residual, dim=1, keepdim=True) / (
            EPSILON * highest.neg_().exp_() + 2 * torch.linalg.vector_norm(g, dim=1, keepdim=True)
        )
        difference = g.mul_(scale).sub_(residual)
        gm = difference.square() / normaliser[rows]
        c = residual.square().div_(batch.normaliser[rows]).div_(gm + EPSILON)
        value = torch.mul(c, gm).sum() * per_element
        dg = difference.mul_(c).mul_((2 * per_element) * scale / normaliser[rows])
        dW_dec = E.t() @ dg
        dh = torch.mm(dg, W_dec.t()).mul_(E)
        return OfDead(dh.t() @ x_centred, dW_dec, dh.sum(dim=0), value)

    return add_of_dead(grad, dead, batch, lane_ghost, run_lanes, ranks)
