"""The norm of the decoder's rows, where it is kept at 1."""

from __future__ import annotations

import torch
from torch import Tensor


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
