"""Attention backends: one function each, chosen per engine, never for the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled dot product attention, which picks its own kernel.

    Args:
        query: (B, heads, N, head_dim); `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        mask: broadcastable to (B, heads, N, N): bool (True attends) or added to the scores; or None.

    Returns:
        (B, heads, N, head_dim), the dtype of `query`.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


BACKENDS: Mapping[str, Attention] = {"sdpa": sdpa}


def resolve_attention(choice: str) -> Attention:
    """Give the function for a name that `EngineSettings` accepted. "auto" is the fastest that runs everywhere."""
    return BACKENDS["sdpa" if choice == "auto" else choice]
