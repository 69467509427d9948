"""Kronecker products beside a linear's weight: how they lie in memory, and how they are computed without being formed.

Letters are those of the factors, left ``a b`` and right ``m n``; N counts the rows of x, of all tokens.

With x as b runs of n columns, x kron(left, right)ᵀ is left times the runs, each times rightᵀ: two small products in
either order, (a, b) and (m, n), in the place of one with (a · m, b · n).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]  # of a matrix; torch says no more of a Size


class Term(NamedTuple):
    """One product of a linear, and where its matrices begin in a buffer, in elements.

    Row i of the linear's output is row (first + i) mod (a · m) of kron(left, right), times a block-diagonal matrix.

    Attributes:
        left: where the (a, b) matrix begins. right: where the (m, n) matrix begins.
        first: row of the product that is the linear's first.
        mixing: where the blocks of the block-diagonal matrix begin.
        width: of one of its blocks; 0 for the identity.
    """

    left: int
    a: int
    b: int
    right: int
    m: int
    n: int
    first: int
    mixing: int
    width: int

    def matrices(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right, views of the buffer."""
        left = buffer[self.left : self.left + self.a * self.b].view(self.a, self.b)
        return left, buffer[self.right : self.right + self.m * self.n].view(self.m, self.n)

    def blocks(self, buffer: Tensor, rows: int) -> Tensor:
        """What `rows` rows are mixed with: (rows · width,), a view; empty for the identity."""
        return buffer[self.mixing : self.mixing + rows * self.width]


def multiplications(left: Shape, right: Shape) -> int:
    """Of one row of x with kron(left, right)ᵀ, in the cheaper order."""
    return min(_left_first(left, right), _right_first(left, right))


def rows_of(x: Tensor, term: Term, buffer: Tensor, rows: int) -> Tensor:
    """The product without mixing: ``N (b n) -> N rows``."""
    product = x.new_empty(x.shape[0], term.a * term.m)
    add_(product, x, *term.matrices(buffer), beta=0)
    if term.first + rows > product.shape[1]:
        return product.roll(-term.first, dims=1)[:, :rows]
    return product[:, term.first : term.first + rows]


def add_(output: Tensor, x: Tensor, left: Tensor, right: Tensor, beta: int = 1) -> None:
    """Write beta · output + x kron(left, right)ᵀ into the output, in the cheaper order.

    Args:
        output: ``N (a m)``, contiguous.
        x: ``N (b n)``, of the same dtype as all others.
        left: ``a b``.
        right: ``m n``.
        beta: 0 overwrites what was there.
    """
    (a, b), (m, n) = left.shape, right.shape
    lefts = left.expand(x.shape[0], a, b)
    if _left_first(left.shape, right.shape) <= _right_first(left.shape, right.shape):
        runs = torch.bmm(lefts, x.unflatten(1, (b, n)))
        output.view(-1, m).addmm_(runs.view(-1, n), right.t(), beta=beta)
    else:
        runs = x.reshape(-1, n) @ right.t()
        output.view(-1, a, m).baddbmm_(lefts, runs.view(-1, b, m), beta=beta)


def _left_first(left: Shape, right: Shape) -> int:
    (a, b), (m, n) = left, right
    return a * b * n + a * m * n


def _right_first(left: Shape, right: Shape) -> int:
    (a, b), (m, n) = left, right
    return b * m * n + a * b * m
