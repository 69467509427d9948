"""What any stack makes of one linear's weight: mixing @ weight + B @ A + Σ mixingᵢ @ kron(leftᵢ, rightᵢ).

Every kind of change keeps this form. A low-rank change adds columns to B, a Kronecker product a term; a rotation T of
the output gives T @ mixing, T @ B and T @ mixingᵢ; DoRA does the same with a diagonal T, after adding its own; GLoRA's
low-rank change of the input adds the columns that the weight so far makes of it. So a stack composes exactly, in its
order, whatever is in it. All of it is float32 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...errors import LoraError
from ...tensors import to_float

# Rotations with blocks of different sizes share blocks of the least common multiple, up to this size.
MAX_BLOCK = 2048


class BaseWeights(Protocol):
    """The model's own weights, for changes that depend on them."""

    def weight(self, module: str) -> Tensor:
        """A linear's weight: (out_features, in_features) float32 on the CPU, dequantized, not to be written."""

    def parameter(self, name: str) -> Tensor:
        """A bias or the scale of a norm: one dimension, any float dtype."""


@dataclass(frozen=True)
class KroneckerTerm:
    """mixing @ (factor · rows of kron(left, right)).

    Attributes:
        left: (a, b), any float dtype.
        right: (m, n), likewise.
        rows: out_features of the linear.
        first: its row i is row (first + i) mod (a · m) of the product.
        factor: a number, which may be as large as a strength may be.
        mixing: (blocks, b, b) float32, a block-diagonal matrix on the rows; None for the identity.
    """

    left: Tensor
    right: Tensor
    rows: int
    first: int
    factor: float
    mixing: Tensor | None = None

    def product(self) -> Tensor:
        """The rows of kron(left, right), without factor and mixing: (rows, b · n) float32. As large as the weight."""
        product = torch.kron(to_float(self.left), to_float(self.right))
        return product.roll(-self.first, 0)[: self.rows]


@dataclass(frozen=True)
class Composed:
    """mixing @ weight + lora_B @ lora_A + the sum of the Kronecker products. Immutable; its methods give the next one.

    Attributes:
        module: the linear.
        base: asked only where a layer depends on the weight.
        lora_B: (out_features, rank) float32, with strengths and scales folded in.
        lora_As: what lora_A consists of, one below the other: (rankᵢ, in_features), any float dtype, as the layers have
            them, so that the linears of a fused layer go on sharing them.
        mixing: (blocks, b, b) float32, a block-diagonal matrix on the rows; None for the identity.
        kroneckers: in the stack's order.
    """

    module: str
    base: BaseWeights | None
    lora_B: Tensor
    lora_As: tuple[Tensor, ...] = ()
    mixing: Tensor | None = None
    kroneckers: tuple[KroneckerTerm, ...] = ()

    @classmethod
    def unchanged(cls, module: str, rows: int, base: BaseWeights | None) -> Composed:
        """A linear with so many rows before the first layer of a stack."""
        return cls(module, base, torch.zeros(rows, 0))

    @property
    def lora_A(self) -> Tensor:
        """(rank, in_features) float32; there must be a low-rank change."""
        return torch.cat([to_float(lora_A) for lora_A in self.lora_As])

    def add(self, lora_A: Tensor, lora_B: Tensor) -> Composed:
        """Add lora_B @ lora_A.

        Args:
            lora_A: (rank, in_features), any float dtype.
            lora_B: (out_features, rank) float32, scaled.
        """
        return replace(self, lora_As=(*self.lora_As, lora_A), lora_B=torch.cat([self.lora_B, lora_B], dim=1))

    def add_kronecker(self, term: KroneckerTerm) -> Composed:
        """Add a Kronecker product."""
        return replace(self, kroneckers=(*self.kroneckers, term))

    def mix(self, blocks: Tensor) -> Composed:
        """Multiply all that the linear computes so far, its bias aside, with a block-diagonal matrix.

        Args:
            blocks: (blocks, b, b) float32; blocks · b is out_features. b = 1 scales rows.

        Raises:
            LoraError: rotations whose blocks have no common size that is small enough.
        """
        return replace(
            self,
            mixing=self._joined(blocks, self.mixing),
            lora_B=mix(blocks, self.lora_B) if self.lora_As else self.lora_B,
            kroneckers=tuple(replace(term, mixing=self._joined(blocks, term.mixing)) for term in self.kroneckers),
        )

    def times(self, columns: Tensor) -> Tensor:
        """The changed weight times (in_features, n) float32, without forming it: (out_features, n)."""
        product = self._weight() @ columns
        if self.mixing is not None:
            product = mix(self.mixing, product)
        if self.lora_As:
            product = product + self.lora_B @ (self.lora_A @ columns)
        for term in self.kroneckers:
            added = term.product() @ columns
            product = product.add(added if term.mixing is None else mix(term.mixing, added), alpha=term.factor)
        return product

    def row_lengths(self) -> Tensor:
        """Euclidean norms of the changed weight's rows: (out_features,)."""
        weight = self._weight()
        if self.mixing is not None:
            weight = mix(self.mixing, weight)
        if self.lora_As:
            weight = torch.addmm(weight, self.lora_B, self.lora_A)
        for term in self.kroneckers:
            product = term.product() if term.mixing is None else mix(term.mixing, term.product())
            weight = weight.add(product, alpha=term.factor)
        lengths: Tensor = weight.norm(dim=1)
        return lengths

    def _weight(self) -> Tensor:
        if self.base is None:
            raise ValueError(f"a LoRA on '{self.module}' depends on its weight, and needs the base weights.")
        return self.base.weight(self.module)

    def _joined(self, blocks: Tensor, mixing: Tensor | None) -> Tensor:
        """The product of two block-diagonal matrices; None is the identity."""
        if mixing is None:
            return blocks
        size = math.lcm(blocks.shape[1], mixing.shape[1])
        if size > MAX_BLOCK:
            raise LoraError(
                f"LoRAs: '{self.module}' is rotated in blocks of {mixing.shape[1]} and of {blocks.shape[1]} rows, "
                f"whose common size is {size}, expected at most {MAX_BLOCK}. Use one of these OFT files at a time."
            )
        return torch.bmm(_widened(blocks, size), _widened(mixing, size))


def mix(blocks: Tensor, rows: Tensor) -> Tensor:
    """A block-diagonal matrix (blocks, b, b) times a matrix (blocks · b, columns)."""
    count, size, _ = blocks.shape
    return torch.bmm(blocks, rows.reshape(count, size, -1)).reshape(rows.shape)


def _widened(blocks: Tensor, size: int) -> Tensor:
    """The same block-diagonal matrix in larger blocks."""
    count, small, _ = blocks.shape
    if small == size:
        return blocks
    ratio = size // small
    wide = torch.zeros(count // ratio, ratio, small, ratio, small)
    index = torch.arange(ratio)
    wide[:, index, :, index, :] = blocks.view(count // ratio, ratio, small, small).transpose(0, 1)
    return wide.view(count // ratio, size, size)
