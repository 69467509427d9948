"""What a kind of change is: the contract that every module of this folder fills in.

A kind says which tensors make it and how files call them, checks their shapes before any value is read, and turns the
values into layers. All else (sorting keys, composing, packing, costs, reports) asks the kind or its layers, with two
exceptions in `read.keys`: every tensor but an alpha must be of a float type, and the width of a LoRA's `A` on the
image embedder tells which model the file is for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget
from . import dora
from .layers import Layer, VectorLayer, split_low_rank
from .lowrank import Factors, Tolerance
from .shapes import Shapes, TensorHeader

ALPHA = "alpha"


@dataclass(frozen=True)
class Values:
    """What a change's layers are made of.

    Attributes:
        tensors: role -> values, finite; those that `factors` stands for may be missing.
        scaling: what the change is multiplied with, besides the strength: alpha / rank.
        tolerance: how far a change of high rank may be cut.
        factors: of a `ProductKind`, see `product_factors`; else None.
    """

    tensors: Mapping[str, Tensor]
    scaling: float
    tolerance: Tolerance
    factors: Factors | None = None


@dataclass(frozen=True)
class Converted:
    """What a change becomes.

    Attributes:
        layers: changes of linears, in the order in which they apply.
        vectors: changes of biases.
    """

    layers: tuple[Layer, ...] = ()
    vectors: tuple[VectorLayer, ...] = ()


@dataclass(frozen=True)
class ComfyAdapter:
    """The object in which ComfyUI's own loaders bring a kind.

    Attributes:
        name: of its class in comfy.weight_adapter.
        roles: of the entries of its `weights`, in order; see the `load` of the class.
    """

    name: str
    roles: tuple[str, ...]


class Kind(ABC):
    """A way in which trainers change a linear. Stateless; one object of each stands in the table of kinds.

    Attributes:
        name: as a person knows it; docs, reports and messages call it so.
        endings: what may stand behind a layer's name in a key -> role of that tensor. The first ending of a role is
            ComfyUI's.
        placed_first: roles whose tensors lie in the flat buffer as the file has them, in the order in which
            `pack.flat` writes them: all linears' of the first role, then those of the next.
        companions: roles, not of its own, that may come with it: "alpha" and those of `dora`.
        adapter_heads: beginnings of endings in which PEFT writes an adapter's name, such as `.lora_A.default.weight`.
        unread_by_comfyui: roles of its own that ComfyUI does not read.
        bias_roles: roles of its own that change a bias.
        comfyui: how it comes from ComfyUI's own loaders; None: as a plain patch, or not at all.
        changes_weight: False for what stands beside a weight and may come with any kind.
        is_product: whether it is a `ProductKind`.
        scaled_by_config: whether PEFT's configuration in a file scales it where there is no alpha.
        sized_by_linear: whether a linear of a text encoder must fit it as one of the transformer must.
    """

    name: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]
    placed_first: ClassVar[tuple[str, ...]] = ()
    companions: ClassVar[tuple[str, ...]] = ()
    adapter_heads: ClassVar[tuple[str, ...]] = ()
    unread_by_comfyui: ClassVar[tuple[str, ...]] = ()
    bias_roles: ClassVar[tuple[str, ...]] = ()
    comfyui: ClassVar[ComfyAdapter | None] = None
    changes_weight: ClassVar[bool] = True
    is_product: ClassVar[bool] = False
    scaled_by_config: ClassVar[bool] = False
    sized_by_linear: ClassVar[bool] = True

    @cached_property
    def roles(self) -> frozenset[str]:
        """Of the tensors that make it."""
        return frozenset(self.endings.values())

    def place(self, role: str) -> float:
        """Sorts roles as `placed_first` has them; any other role comes behind those of every kind."""
        return self.placed_first.index(role) if role in self.placed_first else math.inf

    @abstractmethod
    def check(self, shapes: Shapes) -> int:
        """Check the shapes of its own tensors.

        Returns:
            The rank at which it is exact; 0 where it has none.

        Raises:
            LoraError: a tensor is missing, or has a wrong shape.
        """

    @abstractmethod
    def convert(self, change: Change, values: Values) -> Converted:
        """Turn values into layers.

        Raises:
            LoraError: the values cannot be carried.
        """

    def alpha_rank(self, change: Change) -> int:
        """What alpha is divided by; 0: alpha does not scale it."""
        return change.rank

    def ignores_alpha(self, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether an alpha beside these tensors has no meaning, whatever its value."""
        return False

    def is_stored(self, headers: Mapping[str, TensorHeader]) -> bool:
        """Whether its layers hold the file's own numbers, so that none of them is larger than the file's largest."""
        return False


class ProductKind(Kind):
    """A kind whose low-rank matrices must be computed: exactly, or of a high rank cut at a stated error."""

    is_product: ClassVar[bool] = True

    @abstractmethod
    def factors(self, change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance) -> Factors:
        """The low-rank matrices without alpha; cut as far as the tolerance says if the change is `approximated`."""

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        if values.factors is None:
            raise ValueError(f"{self.name} needs the result of product_factors.")
        return Converted(
            split_low_rank(change.target, values.factors.lora_A, values.factors.lora_B, values.scaling)
        )


@dataclass(frozen=True)
class Change:
    """A change of one linear whose shapes are right.

    Attributes:
        source: what messages begin with, such as `LoRA 'x.safetensors'`.
        name: the layer as the source calls it.
        target: the linears that it means.
        kind: what it is.
        headers: role -> tensor.
        rank: at which it is exact; 0 where it has none.
    """

    source: str
    name: str
    target: LoraTarget
    kind: Kind
    headers: Mapping[str, TensorHeader]
    rank: int

    @property
    def label(self) -> str:
        """The kind as a person knows it, with DoRA over it or without."""
        return dora.label(self.kind.name, self.headers)

    @property
    def ignored(self) -> frozenset[str]:
        """Keys without a meaning, which may hold anything."""
        if ALPHA in self.headers and self.kind.ignores_alpha(self.headers):
            return frozenset((self.headers[ALPHA].key,))
        return frozenset()

    def approximated(self, tolerance: Tolerance) -> bool:
        """Whether it may be cut to a lower rank."""
        return self.kind.is_product and self.rank > tolerance.exact_rank

    def scaling(self, tensors: Mapping[str, Tensor]) -> float:
        """Alpha / rank, as the kind counts its rank; 1 where there is no alpha, or it does not scale."""
        rank = self.kind.alpha_rank(self) if ALPHA in tensors else 0
        return float(tensors[ALPHA]) / rank if rank else 1.0


def product_factors(change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance) -> Factors:
    """The low-rank matrices of a product, without alpha: exact, or cut as the tolerance says.

    Raises:
        LoraError: even the largest allowed rank leaves too large an error.
    """
    if not isinstance(change.kind, ProductKind):
        raise ValueError(f"{change.kind.name} is no product.")
    factors = change.kind.factors(change, tensors, tolerance)
    if factors.error > tolerance.max_error:
        raise LoraError(
            f"{change.source}: the {change.kind.name} on '{change.name}' has rank {change.rank}; the "
            f"{tolerance.max_rank} that the accelerated model keeps leave {factors.error:.0%} of it out, expected at "
            f"most {tolerance.max_error:.0%}. Use ComfyUI's Load Diffusion Model for this file, or one of lower rank."
        )
    return factors
