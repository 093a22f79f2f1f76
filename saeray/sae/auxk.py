"""AuxK: the dead features with the largest pre-activations reconstruct what is left unexplained.

Gao et al., 2406.04093, appendix A.2. With e = x̂ - x of the living, a constant here, and ê the
reconstruction by each row's k_aux = min(D / 2, n_dead) largest relu(h) of the dead, without a bias,
the term is by auxk_scaling (D that of e: of a transcoder, of what it writes)

    residual_variance   auxk_coefficient · Σ‖ê + e‖² / Σ‖e - mean e‖²       (OpenAI; 1/32)
    dead_share          auxk_coefficient · min(2 n_dead / D, 1) · mean_B Σ_D (ê + e)²  (sae_lens; 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeray.sae.architectures.rule import Rule
from saeray.sae.dead_features import OfDead, add_of_dead
from saeray.sae.gradients import Batch, Gradients, Lane, RunLanes
from saeray.sae.ranks import Ranks

AUXK_SCALINGS = ("residual_variance", "dead_share")


def auxk_gradients(
    rule: Rule,
    batch: Batch,
    errors: Tensor,
    dead: Tensor,
    grad: Gradients,
    run_lanes: RunLanes,
    ranks: Ranks,
) -> Tensor:
    """Adds the term's gradient for the dead features (indices, [n]); returns its value.

    errors [B, D], of all ranks' rows.
    """
    sae, by = rule.sae, rule.selected_by()
    W_enc, W_dec, b_enc = sae.W_enc.t()[dead], sae.W_dec[dead], sae.b_enc[dead]
    k_aux = min(sae.d_out // 2, len(dead))
    weight: float | Tensor = rule.options.auxk_coefficient
    if rule.options.auxk_scaling == "residual_variance":
        variance = (errors - errors.mean(dim=0)).square().sum()
        weight = weight / variance if float(variance) > 0 else errors.new_zeros(())
    else:
        weight = weight * min(2 * len(dead) / sae.d_out, 1.0) / len(errors)

    def lane_auxk(lane: Lane) -> OfDead:
        rows = slice(*lane)
        x_centred = batch.x[rows] - sae.b_dec
        z = torch.addmm(b_enc, x_centred, W_enc.t()).clamp_min_(0)  # [rows, dead]
        if k_aux < len(dead):
            ranked = z if by is None else z * by[dead]
            _, features = ranked.topk(k_aux, dim=1, sorted=False)
            z = torch.zeros_like(z).scatter_(1, features, z.gather(1, features))
        off = torch.addmm(errors[rows], z, W_dec)
        value = off.square().sum() * weight
        dx_hat = off.mul_(2 * weight)
        dz = torch.mm(dx_hat, W_dec.t()).mul_(z > 0)
        return OfDead(dz.t() @ x_centred, z.t() @ dx_hat, dz.sum(dim=0), value)

    return add_of_dead(grad, dead, batch, lane_auxk, run_lanes, ranks)
