"""What a change becomes beside one linear of the model, and the two forms that lie in a flat buffer as they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...families.layout import LoraTarget, swap_halves
from ...linear.kronecker import multiplications
from ...tensors import to_float
from .composed import Composed, KroneckerTerm


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs when it is bound.

    Attributes:
        elements: numbers on the device that are its own.
        multiplications: of its own matrices, for one token in every step.
        shared: a matrix that linears of one fused layer share, which then counts once; None without.
        shared_multiplications: of that matrix.
        has_kronecker: whether it is a Kronecker product.
    """

    elements: int
    multiplications: int
    shared: Tensor | None = None
    shared_multiplications: int = 0
    has_kronecker: bool = False


@dataclass(frozen=True)
class Layer(ABC):
    """A change of one linear, on the CPU. Each kind has its own, or one of the two forms below.

    Attributes:
        module: the diffusers linear.
        reads_weight: whether what it becomes depends on the weight that it changes.
        only_adds: whether it adds the same to any weight, times the strength; it is then `low_rank` or `kronecker`.
    """

    module: str
    reads_weight: ClassVar[bool] = False
    only_adds: ClassVar[bool] = False

    @property
    @abstractmethod
    def rows(self) -> int:
        """out_features of the linear."""

    @property
    def rank(self) -> int:
        """Columns that it takes of a lora_B; 0 where it is no low-rank change."""
        return 0

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps in memory."""

    @property
    @abstractmethod
    def cost(self) -> LayerCost:
        """What it costs when it is bound."""

    @abstractmethod
    def apply(self, state: Composed, strength: float) -> Composed:
        """Change what the linear computes so far.

        Raises:
            LoraError: the layer and what came before it have no common form.
            ValueError: it reads the weight, and there is none to read.
        """

    @property
    def low_rank(self) -> LoraLayer | None:
        """The layer itself where all that it does is to add lora_B @ lora_A."""
        return None

    @property
    def kronecker(self) -> KroneckerLayer | None:
        """The layer itself where all that it does is to add a Kronecker product."""
        return None


class AddingLayer(Layer):
    """A layer that only adds to the weight: DoRA goes over any of them."""

    only_adds: ClassVar[bool] = True

    @abstractmethod
    def add_to(self, state: Composed, strength: float, gain: Tensor | None = None) -> Composed:
        """Add it, its rows multiplied by a gain: (out_features,) float32."""

    def apply(self, state: Composed, strength: float) -> Composed:
        """See `Layer`."""
        return self.add_to(state, strength)


@dataclass(frozen=True)
class LoraLayer(AddingLayer):
    """A low-rank change of one linear: weight + scale · lora_B @ lora_A.

    Attributes:
        lora_A: (rank, in_features) on the CPU, in the file's dtype.
        lora_B: (out_features, rank), likewise.
        scale: alpha / rank; 1 where the file has no alpha.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return self.lora_B.shape[0]

    @property
    def rank(self) -> int:
        """Columns of lora_B."""
        return self.lora_B.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return self.lora_A, self.lora_B

    @property
    def cost(self) -> LayerCost:
        """See `Layer`."""
        return LayerCost(self.lora_B.numel(), self.lora_B.numel(), self.lora_A, self.lora_A.numel())

    @property
    def low_rank(self) -> LoraLayer:
        """See `Layer`."""
        return self

    def factors(self, dtype: torch.dtype) -> tuple[float, float]:
        """What lora_A and lora_B are multiplied with when they are stored in a dtype; together that is `scale`.

        float16 has no small numbers with all digits: alpha / rank on lora_B alone, 1 / 128 for example, would cost it a
        percent of its values. Half of it goes into lora_A, as a power of two, which costs nothing there.
        """
        if dtype != torch.float16 or not 0.0 < abs(self.scale) < 1.0:
            return 1.0, self.scale
        half = 2.0 ** round(math.log2(abs(self.scale)) / 2)
        return half, self.scale / half

    def add_to(self, state: Composed, strength: float, gain: Tensor | None = None) -> Composed:
        """See `AddingLayer`."""
        factor = strength * self.scale
        return state.add(self.lora_A, (factor if gain is None else factor * gain[:, None]) * to_float(self.lora_B))


@dataclass(frozen=True)
class KroneckerLayer(AddingLayer):
    """A Kronecker product beside one linear: weight + scale · rows of kron(left, right).

    Attributes:
        left: (a, b) on the CPU, in the file's dtype; of a fused linear only the rows that this part of it needs.
        right: (m, n), likewise; b · n is in_features. Parts of a fused linear share it.
        scale: what the product is multiplied with, besides the strength.
        out_features: of the linear.
        first: its row i is row (first + i) mod (a · m) of the product.
    """

    left: Tensor
    right: Tensor
    scale: float
    out_features: int
    first: int = 0

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return self.out_features

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return self.left, self.right

    @property
    def cost(self) -> LayerCost:
        """See `Layer`."""
        products = multiplications(self.left.shape, self.right.shape)
        return LayerCost(self.left.numel(), products, self.right, has_kronecker=True)

    @property
    def kronecker(self) -> KroneckerLayer:
        """See `Layer`."""
        return self

    def term(self, strength: float) -> KroneckerTerm:
        """What it adds at a strength."""
        return KroneckerTerm(self.left, self.right, self.out_features, self.first, strength * self.scale)

    def add_to(self, state: Composed, strength: float, gain: Tensor | None = None) -> Composed:
        """See `AddingLayer`."""
        term = self.term(strength)
        if gain is not None:
            term = KroneckerTerm(term.left, term.right, term.rows, term.first, term.factor, gain[:, None, None])
        return state.add_kronecker(term)


@dataclass(frozen=True)
class VectorLayer:
    """A change of a bias or of a norm's scale.

    Attributes:
        parameter: the diffusers parameter.
        value: (size,) float32.
        scale: what the value is multiplied with, besides the strength.
        replaces: the value stands in the parameter's place, whatever the strength.
    """

    parameter: str
    value: Tensor
    scale: float = 1.0
    replaces: bool = False


def split_rows(target: LoraTarget, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each linear of a target, and its rows of (out_features, …): views, or copies where halves change places."""
    if target.swap_halves:
        rows = swap_halves(rows)
    for part in target.parts:
        yield part.module, rows[part.start : part.start + part.rows]


def split_low_rank(target: LoraTarget, lora_A: Tensor, lora_B: Tensor, scale: float) -> tuple[LoraLayer, ...]:
    """Give each linear of a target its rows of lora_B; lora_A serves them all."""
    return tuple(LoraLayer(module, lora_A, rows, scale) for module, rows in split_rows(target, lora_B))


def split_bias(target: LoraTarget, value: Tensor, scale: float) -> tuple[VectorLayer, ...]:
    """Give each linear of a target its part of a difference of biases: (out_features,) float32."""
    return tuple(VectorLayer(f"{module}.bias", rows, scale) for module, rows in split_rows(target, value))
