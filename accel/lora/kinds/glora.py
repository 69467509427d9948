"""GLoRA: scaling · (weight @ a1 @ a2 + b1 @ b2). In older files a1 and a2, b1 and b2 are exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...families.layout import LoraTarget
from ...tensors import to_float
from .base import ALPHA, Change, ComfyAdapter, Converted, Kind, Values
from .composed import Composed
from .layers import Layer, LayerCost, split_low_rank
from .shapes import Shapes, TensorHeader

ROLES = ("a1", "a2", "b1", "b2")
OLD_ROLES = ("a2", "a1", "b2", "b1")


@dataclass(frozen=True)
class InputLayer(Layer):
    """A low-rank change of what one linear reads: weight + scale · (weight @ columns) @ lora_A.

    Attributes:
        columns: (in_features, rank) on the CPU, in the file's dtype.
        lora_A: (rank, in_features), likewise.
        scale: what the product is multiplied with, besides the strength.
        out_features: of the linear.
    """

    columns: Tensor
    lora_A: Tensor
    scale: float
    out_features: int
    reads_weight: ClassVar[bool] = True

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return self.out_features

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return self.columns, self.lora_A

    @property
    def cost(self) -> LayerCost:
        """See `Layer`: that of a LoRA, whose lora_B the weight makes of the columns."""
        own = self.out_features * self.rank
        return LayerCost(own, own, self.lora_A, self.lora_A.numel())

    def apply(self, state: Composed, strength: float) -> Composed:
        """See `Layer`."""
        lora_B = state.times(to_float(self.columns))
        return state.add(self.lora_A, strength * self.scale * lora_B)


class Glora(Kind):
    """A change of what the linear reads, and one of what it computes."""

    name: ClassVar[str] = "GLoRA"
    endings: ClassVar[Mapping[str, str]] = {f".{role}.weight": role for role in ROLES}
    companions: ClassVar[tuple[str, ...]] = (ALPHA,)
    comfyui: ClassVar[ComfyAdapter] = ComfyAdapter("GLoRAAdapter", (*ROLES, ALPHA, "dora_scale"))

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        for role in ROLES:
            shapes.need(role, role)
            shapes.matrix(role)
        roles = _ordered(shapes.target, shapes.headers)
        rank = shapes.matrix(roles[1])[0]
        for role, expected in zip(roles, _expected(shapes.target, rank), strict=True):
            shapes.expect(role, shapes.matrix(role) == expected, str(expected))
        return rank

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        target, scale = change.target, values.scaling
        roles = _ordered(target, change.headers)
        columns, lora_A, up, down = (values.tensors[role].flatten(1) for role in roles)
        inputs = [InputLayer(part.module, columns, lora_A, scale, part.rows) for part in target.parts]
        # ComfyUI adds both to the weight at once: what reads the weight comes first.
        return Converted((*inputs, *split_low_rank(target, down, up, scale)))


def _ordered(target: LoraTarget, headers: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """The roles of the (in_features, r), (r, in_features), (out_features, r) and (r, in_features) matrices.

    LyCORIS has written them in two ways. Where both are possible, it is the older one, as for ComfyUI.
    """
    expected = _expected(target, headers["a1"].shape[0])
    old = all(headers[role].shape[:2] == shape for role, shape in zip(OLD_ROLES, expected, strict=True))
    return OLD_ROLES if old else ROLES


def _expected(target: LoraTarget, rank: int) -> tuple[tuple[int, int], ...]:
    down = rank, target.in_features
    return (target.in_features, rank), down, (target.out_features, rank), down
