"""Operators for libraries whose functions torch.compile cannot trace, one for each backend that needs it.

Opaque, with a stated result, and nothing that they write: torch.compile puts a call into its graph, whatever the
library does inside. A backend registers its kernel under its own name, so nothing here knows the backends.

The kernels take no masks, so each backend hands a call with a mask to SDPA. Which of both is decided when the call is
traced, as whether there is a mask is part of what is traced anyway: masks add no compile. Backends are plain functions
of their modules, without closures: what torch.compile makes of those can be stored for the next start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE, PREFIX = "flux_hotswap", "attention_"
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def opaque(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Call a backend's kernel behind its operator. `register` comes first.

    Args:
        query: (B, heads, N, head_dim), a view of (B, N, heads, head_dim); `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        backend: its name.

    Returns:
        As `query`, and again such a view.
    """
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    attention = getattr(torch.ops.flux_hotswap, "attention_" + backend)
    return attention(query, key, value).transpose(1, 2)


@functools.cache
def register(backend: str, kernel: Kernel) -> torch.library.Library | None:
    """Make a backend's operator known to PyTorch, which it is as long as what this gives lives: it is remembered.

    Args:
        backend: its name.
        kernel: (B, N, heads, head_dim) three times -> the same.
    """
    name = PREFIX + backend
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        return None  # this file was imported under another package name before: the operator is the same
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"{name}(Tensor query, Tensor key, Tensor value) -> Tensor")
    library.impl(name, functools.partial(_run, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _like, lib=library)
    return library


def _run(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return kernel(query, key, value).contiguous()


def _like(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)
