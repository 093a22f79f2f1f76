"""The standard SAE: one hidden layer, ReLU, untied weights.

    f = relu((x - b_dec) W_enc + b_enc)        x̂ = f W_dec + b_dec

Shapes: x, x̂ [B, D]; f [B, L]; W_enc [D, L]; W_dec [L, D]; b_enc [L]; b_dec [D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ENCODER_INITS = ("decoder_transpose", "independent")


class StandardSAE(nn.Module):
    """Weights and forward pass. Training works on the weights directly (`saeray.sae.trainer`)."""

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        """Takes the four tensors; W_enc's memory is a row per feature, as W_dec's is.

        Raises:
            ValueError: shapes that do not belong together.
        """
        super().__init__()
        d_in, d_sae = W_enc.shape
        shapes = (tuple(W_dec.shape), tuple(b_enc.shape), tuple(b_dec.shape))
        if shapes != ((d_sae, d_in), (d_sae,), (d_in,)):
            raise ValueError(
                f"W_enc [{d_in}, {d_sae}] needs W_dec [{d_sae}, {d_in}], b_enc [{d_sae}], "
                f"b_dec [{d_in}]; got {shapes}"
            )
        # What a feature reads lies together: a step that touches few features touches few rows.
        self.W_enc = nn.Parameter(W_enc.t().contiguous().t(), requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def for_unscaled(self, scale: float) -> StandardSAE:
        """The same function of x where this SAE is one of scale * x, in x's own units.

        f(scale x) with W_enc scaled up, x̂ with W_dec and b_dec scaled down; b_enc as it is.
        """
        if scale == 1.0:
            return self
        return StandardSAE(
            self.W_enc * scale, self.W_dec / scale, self.b_enc.clone(), self.b_dec / scale
        )

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> feature activations f [..., L]."""
        return torch.relu((x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        """f [..., L] -> reconstruction x̂ [..., D]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> reconstruction [..., D]."""
        return self.decode(self.encode(x))


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
) -> StandardSAE:
    """Fresh weights: W_dec Kaiming-uniform with rows scaled to decoder_init_norm, b_enc zero.

    encoder_init: "decoder_transpose", W_enc = encoder_init_scale * W_decᵀ, so that every feature
    starts by reading what it writes; or "independent", W_enc Kaiming-uniform as well.

    Drawn on the CPU in float32 from a generator of its own, so the same seed gives the same
    weights on every device and whatever else the process has drawn.

    Raises:
        ValueError: an unknown encoder_init.
    """
    if encoder_init not in ENCODER_INITS:
        raise ValueError(f"encoder_init {encoder_init!r}: one of {ENCODER_INITS}")
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.empty(d_in, d_sae), torch.empty(d_sae, d_in)
    if encoder_init == "independent":
        nn.init.kaiming_uniform_(W_enc, generator=generator)
    nn.init.kaiming_uniform_(W_dec, generator=generator)
    scale_rows_to_unit_norm(W_dec)
    if decoder_init_norm != 1.0:
        W_dec.mul_(decoder_init_norm)
    if encoder_init == "decoder_transpose":
        W_enc.copy_(W_dec.t()).mul_(encoder_init_scale)
    return StandardSAE(
        W_enc.to(dtype), W_dec.to(dtype), torch.zeros(d_sae, dtype=dtype), b_dec.to(dtype).clone()
    )


def scale_rows_to_unit_norm(W_dec: Tensor) -> None:
    """Scales every row of W_dec [L, D] to L2 norm 1, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))


def remove_parallel_component(grad: Tensor, W_dec: Tensor) -> None:
    """Subtracts from each row of grad [L, D] its component along the (unit) row of W_dec.

    A step along the row would only change its norm, which is scaled back to 1 anyway; leaving it
    in would feed Adam's moments with a direction that is then thrown away.
    """
    along = torch.linalg.vecdot(grad, W_dec).unsqueeze_(1)  # [L, 1]
    grad.addcmul_(along, W_dec, value=-1.0)
