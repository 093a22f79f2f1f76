"""The weights that training starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saeray.sae.architectures import ARCHITECTURES, Architecture
from saeray.sae.architectures.base import SAE
from saeray.sae.decoder_norm import scale_rows_to_unit_norm
from saeray.sae.options import TrainingOptions

ENCODER_INITS = ("decoder_transpose", "independent")


def initial_sae(
    d_in: int,
    d_sae: int,
    *,
    seed: int,
    b_dec: Tensor,
    dtype: torch.dtype,
    encoder_init: str = "independent",
    encoder_init_scale: float = 1.0,
    decoder_init_norm: float = 1.0,
    architecture: Architecture = ARCHITECTURES["standard"],
    options: TrainingOptions | None = None,
    b_dec_out: Tensor | None = None,
    skip: bool = False,
) -> SAE:
    """Fresh weights: W_dec Kaiming-uniform with rows scaled to decoder_init_norm, b_enc zero.

    encoder_init: "decoder_transpose", W_enc = encoder_init_scale * W_decᵀ, so that every feature
    starts by reading what it writes; or "independent", W_enc Kaiming-uniform as well.

    options: what the architecture's own parameters and settings begin with, where it has any.

    b_dec_out [O]: of a transcoder. skip: and with a W_skip, of zeros.

    Drawn on the CPU in float32 from a generator of its own, so the same seed gives the same
    weights on every device and whatever else the process has drawn.

    Raises:
        ValueError: an unknown encoder_init.
    """
    if encoder_init not in ENCODER_INITS:
        raise ValueError(f"encoder_init {encoder_init!r}: one of {ENCODER_INITS}")
    generator = torch.Generator().manual_seed(seed)
    d_out = d_in if b_dec_out is None else len(b_dec_out)
    W_enc, W_dec = torch.empty(d_in, d_sae), torch.empty(d_sae, d_out)
    if encoder_init == "independent":
        nn.init.kaiming_uniform_(W_enc, generator=generator)
    nn.init.kaiming_uniform_(W_dec, generator=generator)
    scale_rows_to_unit_norm(W_dec)
    if decoder_init_norm != 1.0:
        W_dec.mul_(decoder_init_norm)
    if encoder_init == "decoder_transpose":
        W_enc.copy_(W_dec.t()).mul_(encoder_init_scale)
    kind = architecture.sae
    extra = {
        name: torch.full((d_sae,), architecture.rule.starts(name, options), dtype=dtype)
        for name in kind.EXTRA
    }
    settings = {name: getattr(options, name) for name in kind.SETTINGS}
    b_enc = torch.zeros(d_sae, dtype=dtype)
    output = {} if b_dec_out is None else {"b_dec_out": b_dec_out.to(dtype).clone()}
    if skip:
        output["W_skip"] = torch.zeros(d_in, d_out, dtype=dtype)
    return kind(
        W_enc.to(dtype), W_dec.to(dtype), b_enc, b_dec.to(dtype).clone(),
        **output, **extra, **settings,
    )  # fmt: skip
