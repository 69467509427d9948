"""SageAttention: queries and keys in 8 bits, on most cards the values too. Faster than exact attention, and lossy.

Signature of sageattention 2.2.0. Version 1 writes into the keys that it is given (`k -= km`), so it is not taken.
thu-ml/SageAttention: sageattention/core.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import HALF, Attention, Backend, MaxDeviation, nvidia
from .library import Library
from .native import sdpa
from .operator import opaque, register

LIBRARY = Library(
    "sageattention", "sageattention", "sageattn",
    "build it from github.com/thu-ml/SageAttention, or install a wheel of 2.2 for your torch (PyPI has version 1 only)",
    "2.1.1",
)  # fmt: skip

# Its quantization, computed in float32 on a CPU: queries and keys in int8, values and weights in float8 or float16, is
# at 0.039 / 0.078 and 0.023 / 0.068.
MAX_DEVIATION = MaxDeviation(0.08, 0.25)


def sage(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SageAttention; see `native.sdpa`."""
    return opaque(query, key, value, "sage") if mask is None else sdpa(query, key, value, mask)


def _make() -> Attention:
    register("sage", _sage)
    return sage


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # It makes the tensors' device the current one, and leaves it so.
    with torch.cuda.device_of(query):
        return LIBRARY.load()(query, key, value, tensor_layout="NHD")


SAGE = Backend(
    name="sage",
    hardware=nvidia(8, 9, 12, max_head_dim=128),
    library=LIBRARY.missing,
    make=_make,
    instead=("flash_3", "flash_2", "cudnn"),
    max_deviation=dict.fromkeys(HALF, MAX_DEVIATION),
    exact=False,
)
