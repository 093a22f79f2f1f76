"""Resampling: a dead feature is made to read and write what the SAE reconstructs badly.

Every dead_feature_window steps, features that have not fired in the sampling window so far take the
place of activations x. Of each context of BATCHES LM batches one token is picked, with probability
in proportion to a weight; of these, one for each feature, contexts are drawn in proportion to the
same weight and without replacement:

    W_dec[j] = x / ‖x‖      W_enc[:, j] = 0.2 · mean norm of the living's columns · x / ‖x‖
    b_enc[j] = 0            Adam's moments of exactly these slices: 0

(a free decoder's row gets the living rows' mean norm). The learning rate then begins again at
1/10,000 and climbs back over RAMP_STEPS, or a tenth of a short training; towards the end, where
there would be no time for that, nothing is resampled. Bricken et al. 2023, and the guide's code.

The weight, by feature_sampling_method:

    anthropic   relu(Δ), Δ the token's cross-entropy with the SAE spliced in, less that without it
    l2          its squared error

It takes the language model to know them, so whoever trains has them made and calls
`SAETrainer.resample`; which LM batches they are of is `batches_of`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from saeray.sae.options import TrainingOptions

BATCHES = 32  # LM batches, as in the guide's code
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


def batches_of(n_rows: int, block_rows: int, n_blocks: int) -> range:
    """The LM batches that rows are taken from after n_rows of a stream of n_blocks of them.

    The last BATCHES of which something was trained on, or the first where there were fewer: a
    function of the step alone, and of text that has been made already.
    """
    last = min(n_blocks, max(BATCHES, -(-n_rows // block_rows)))
    return range(max(0, last - BATCHES), last)


def lr_factor(options: TrainingOptions, step: int, resampled: int | None) -> float:
    """What the learning rate of a step is multiplied by; resampled: before which step, last."""
    if resampled is None:
        return 1.0
    climbed = (step - resampled) / ramp_steps(options.total_steps)
    return min(1.0, RAMP_FROM + (1 - RAMP_FROM) * climbed)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU for these numbers; torch itself seeds it by 32 bits alone."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def usable(weights: Tensor) -> Tensor:
    """Weights on the CPU in float64; what is below 0, or not finite, is never drawn."""
    weights = weights.detach().cpu().double()
    return torch.where(torch.isfinite(weights), weights, torch.zeros_like(weights)).clamp_min(0)


def pick_tokens(weights: Tensor, *seeded_by: int) -> tuple[Tensor, Tensor]:
    """Of each context one token, by weights [n, context]: its place [n] int64, its weight [n].

    The weight is 0 where a context has no token to pick.
    """
    weights = usable(weights)
    upto = weights.cumsum(dim=1)
    at = torch.rand(len(weights), 1, generator=generator_of(*seeded_by), dtype=torch.float64)
    # The first place whose sum is above the draw, so one of a weight above 0.
    picked = torch.searchsorted(upto, at * upto[:, -1:], right=True)
    picked = picked.clamp_max(weights.shape[1] - 1)
    return picked.squeeze(1), weights.gather(1, picked).squeeze(1)


def choose_rows(weights: Tensor, n: int, seed: int, step: int) -> Tensor:
    """Up to n different rows, by their weights [rows]; the same on every device."""
    weights = usable(weights)
    n = min(n, int((weights > 0).sum()))
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    generator = generator_of(seed, step)
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
