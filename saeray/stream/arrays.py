"""Activations as they travel: numpy arrays, which Ray shares between processes without a copy.

bfloat16, which numpy does not know, travels as its bits in int16.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

# Ray's arrays are read-only, which torch has no notion of; nobody writes to them (`to_tensor`).
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def to_array(x: Tensor) -> np.ndarray:
    """A contiguous CPU array of the same bits."""
    x = x.contiguous().cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_array`, without a copy: the tensor must not be written to."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
