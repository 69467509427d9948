"""The place for others inside a block's attention.

Shapes: b batch, n tokens, heads of d columns each.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class InsideAttention(Protocol):
    """What others do inside a block's attention. Blocks that have it run uncompiled."""

    def before(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Change what attention reads: ``b heads n d`` each, the transformer's dtype, before they are turned.

        Keys and values may become more or fewer; the rotary table has to reach over them.
        """

    def after(self, attended: Tensor) -> Tensor:
        """Change what it gives, ``b n (heads d)``."""
