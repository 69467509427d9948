"""xFormers' memory-efficient attention, which picks a kernel of its own, and takes float32 too.

Signature of xformers 0.0.29 to 0.0.35. facebookresearch/xformers: xformers/ops/fmha/__init__.py.
"""

from __future__ import annotations

from torch import Tensor

from .backend import EXACT, Attention, Backend, nvidia
from .library import Library
from .native import sdpa
from .operator import opaque, register

LIBRARY = Library(
    "xformers", "xformers.ops", "memory_efficient_attention",
    "pip install xformers, in the version for your torch", "0.0.29",
)  # fmt: skip


def xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Run xFormers' attention; see `native.sdpa`."""
    return opaque(query, key, value, "xformers") if mask is None else sdpa(query, key, value, mask)


def _make() -> Attention:
    register("xformers", _xformers)
    return xformers


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return LIBRARY.load()(query, key, value)


XFORMERS = Backend(
    name="xformers",
    hardware=nvidia(7, 8, 9, 10, 11, 12, max_head_dim=256, amd=True),
    library=LIBRARY.missing,
    make=_make,
    instead=("flash_2", "cudnn"),
    max_deviation=EXACT,
)
