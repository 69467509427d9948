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
