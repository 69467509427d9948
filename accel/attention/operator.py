"""One operator for libraries whose functions torch.compile cannot trace.

Opaque, with a stated result, and nothing that it writes: torch.compile puts a call of it into its graph, whatever the
library does inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .backend import Attention
from .native import sdpa

SCHEMA = "attention(Tensor query, Tensor key, Tensor value, str backend) -> Tensor"


def opaque(backend: str) -> Attention:
    """The function of a backend, around its `Backend.kernel`."""
    operator, _ = _registered()
    return tokens_first(lambda query, key, value: operator(query, key, value, backend))


def tokens_first(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attention:
    """An `Attention` around a function of three (B, N, heads, head_dim) that takes no mask.

    A call with a mask goes to SDPA. Which of both is decided when the call is traced, as whether there is a mask is
    part of what is traced anyway: masks add no compile.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return sdpa(query, key, value, mask)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        return run(query, key, value).transpose(1, 2)

    return attention


def _run(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    from .backends import BACKENDS  # it knows this module

    return BACKENDS[backend].kernel(query, key, value).contiguous()


def _like(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    return query.new_empty(query.shape)


@functools.cache
def _registered() -> tuple[Callable[..., Tensor], torch.library.Library | None]:
    """The operator, and what its registration lives as long as."""
    namespace, name = "flux_hotswap", "attention"
    library = None
    if not hasattr(getattr(torch.ops, namespace), name):  # or this file was imported under another package name before
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(SCHEMA)
        library.impl(name, _run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", _like, lib=library)
    return getattr(getattr(torch.ops, namespace), name).default, library
