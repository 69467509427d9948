"""What is asked of a tensor in more than one place."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; far faster than `isfinite().all()` on a CPU."""
    # float8 has no aminmax; every float8 value is exact in bfloat16.
    values = tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor
    if not values.numel():
        return True
    # NaN and infinity never leave a sum again. One of large values may overflow: only then are they looked at.
    if bool(torch.isfinite(values.sum())):
        return True
    low, high = torch.aminmax(values)  # NaN comes out of both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def to_float(tensor: Tensor) -> Tensor:
    """The same values in float32; not a copy where they are that already."""
    return tensor.to(torch.float32)


def own_vector(tensor: Tensor) -> Tensor:
    """The values in one dimension, float32, in memory of their own: a view would keep a whole file's alive."""
    return tensor.flatten().to(torch.float32, copy=True)
