"""What is asked of a tensor in more than one place."""

import pytest
import torch

from accel.tensors import all_finite

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite(dtype):
    values = torch.linspace(-3, 3, 1000).to(dtype)
    assert all_finite(values)
    assert all_finite(torch.empty(0, dtype=dtype))
    # the sum of these overflows, or is none
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    for broken in [float("nan")] + [float("inf"), float("-inf")] * (dtype != torch.float8_e4m3fn):
        for place in (0, 500, 999):
            damaged = values.float()
            damaged[place] = broken
            assert not all_finite(damaged.to(dtype)), (broken, place)
    if dtype != torch.float8_e4m3fn:
        both = values.float()
        both[3], both[7] = float("inf"), float("-inf")
        assert not all_finite(both.to(dtype))
