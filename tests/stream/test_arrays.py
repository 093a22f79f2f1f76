"""Activations travel as arrays of the same bits."""

import pytest
import torch

from saeray.stream.arrays import to_array, to_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_travel_bit_for_bit(dtype):
    x = torch.randn(5, 3).to(dtype)
    back = to_tensor(to_array(x), dtype)
    assert back.dtype == dtype
    assert torch.equal(back, x)
    frozen = to_array(x).copy()
    frozen.setflags(write=False)
    assert torch.equal(to_tensor(frozen, dtype), x)
