"""Resampling: a dead feature is made to read and write what the SAE reconstructs badly.

Every dead_feature_window steps, features that have not fired in the sampling window so far take the
place of rows x, chosen without replacement with probability in proportion to a weight; one row for
each, and no more features than rows:

    W_dec[j] = x / ‖x‖      W_enc[:, j] = 0.2 · mean norm of the living's columns · x / ‖x‖
    b_enc[j] = 0            Adam's moments of exactly these slices: 0

(a free decoder's row gets the living rows' mean norm). The learning rate then begins again at
1/10,000 and climbs back over RAMP_STEPS, or a tenth of a short training; towards the end, where
there would be no time for that, nothing is resampled. Bricken et al. 2023, and the guide's code.

feature_sampling_method "l2": the rows of the batch at hand, by their squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeray.sae.options import TrainingOptions

METHODS = ("l2",)
ENCODER_SHARE = 0.2  # of the living's mean norm
RAMP_STEPS = 10_000
RAMP_FROM = 1e-4


def ramp_steps(total_steps: int) -> int:
    """In how many steps the learning rate is back."""
    return max(1, min(RAMP_STEPS, total_steps // 10))


def is_due(options: TrainingOptions, done: int) -> bool:
    """Whether dead features are resampled after so many steps."""
    if options.feature_sampling_method is None or done % options.dead_feature_window:
        return False
    left = options.total_steps - done
    return left >= max(options.dead_feature_window, 2 * ramp_steps(options.total_steps))


def lr_factor(options: TrainingOptions, step: int, resampled: int | None) -> float:
    """What the learning rate of a step is multiplied by; resampled: before which step, last."""
    if resampled is None:
        return 1.0
    climbed = (step - resampled) / ramp_steps(options.total_steps)
    return min(1.0, RAMP_FROM + (1 - RAMP_FROM) * climbed)


def choose_rows(weights: Tensor, n: int, seed: int, step: int) -> Tensor:
    """Up to n different rows, by their weights [rows], not below 0; the same on every device."""
    weights = weights.detach().cpu().double()
    weights = torch.where(torch.isfinite(weights), weights, torch.zeros_like(weights))
    n = min(n, int((weights > 0).sum()))
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed((seed << 32) ^ step)
    return torch.multinomial(weights, n, replacement=False, generator=generator)


def resample(
    tensors: dict[str, Tensor], moments: list[dict[str, Tensor]], dead: Tensor, rows: Tensor
) -> None:
    """Features dead [n] take the place of rows [n, D]; the SAE's tensors and Adam's, in place.

    moments: exp_avg and exp_avg_sq of each tensor, in their order.
    """
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    living = torch.ones(W_dec.shape[0], dtype=torch.bool, device=W_dec.device)
    living[dead] = False
    direction = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)

    def mean_norm(by_feature: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(by_feature, dim=1)
        return norms[living].mean() if bool(living.any()) else norms.mean()

    read, write = mean_norm(W_enc.t()), mean_norm(W_dec)
    W_enc.t()[dead] = direction * (ENCODER_SHARE * read)
    W_dec[dead] = direction * write
    for name, of in zip(tensors, moments, strict=True):
        if name not in ("W_enc", "W_dec", "b_dec"):  # of features: biases, gains
            tensors[name][dead] = 0
        if name == "b_dec":
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            if key in of:
                (of[key].t() if name == "W_enc" else of[key])[dead] = 0
