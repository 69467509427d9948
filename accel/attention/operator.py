"""One operator for libraries whose functions torch.compile cannot trace.

Opaque, with a stated result, and nothing that it writes: torch.compile puts a call of it into its graph, whatever the
library does inside.

The kernels take no masks, so each backend hands a call with a mask to SDPA. Which of both is decided when the call is
traced, as whether there is a mask is part of what is traced anyway: masks add no compile. Backends are plain functions
of their modules, without closures: what torch.compile makes of those can be stored for the next start.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NAMESPACE, NAME = "flux_hotswap", "attention"
SCHEMA = f"{NAME}(Tensor query, Tensor key, Tensor value, str backend) -> Tensor"


def opaque(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Call a backend's `Backend.kernel` behind the operator. `register` comes first.

    Args:
        query: (B, heads, N, head_dim), a view of (B, N, heads, head_dim); `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        backend: its name.

    Returns:
        As `query`, and again such a view.
    """
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return torch.ops.flux_hotswap.attention(query, key, value, backend).transpose(1, 2)


@functools.cache
def register() -> torch.library.Library | None:
    """Make the operator known to PyTorch; the registration lives as long as what this gives, which is remembered."""
    if hasattr(getattr(torch.ops, NAMESPACE), NAME):
        return None  # this file was imported under another package name before: the operator is the same
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(SCHEMA)
    library.impl(NAME, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{NAME}", _like, lib=library)
    return library


def _run(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    from .backends import BACKENDS  # it knows this module

    return BACKENDS[backend].kernel(query, key, value).contiguous()


def _like(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    return query.new_empty(query.shape)
