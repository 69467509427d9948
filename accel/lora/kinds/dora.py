"""DoRA: the length of a weight's rows as a parameter of its own, over any kind that only adds to the weight.

As ComfyUI reads `dora_scale`, at strength s: (1 - s) · weight + s · m / ‖rows of weight‖ · (weight + change). As PEFT
computes `lora_magnitude_vector`: m / ‖rows of weight + s · change‖ · (weight + s · change) (peft/tuners/lora/dora.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget
from ...tensors import own_vector
from .composed import Composed
from .layers import AddingLayer, Layer, LayerCost, split_rows
from .shapes import INSTEAD, Shapes

NAME = "DoRA"
# The end of a key -> role.
ENDINGS: Mapping[str, str] = {
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Behind which PEFT writes the name of an adapter.
ADAPTER_HEADS = (".lora_magnitude_vector.",)
ROLES = frozenset(ENDINGS.values())
UNREAD_BY_COMFYUI = ("magnitude",)


@dataclass(frozen=True)
class MagnitudeLayer(Layer):
    """A layer under DoRA, which fixes the length of the changed weight's rows.

    Attributes:
        change: what is added to the weight.
        lengths: (out_features,) float32.
        measures_change: whether rows are measured with the change (PEFT's reading) or before it (ComfyUI's).
    """

    change: AddingLayer
    lengths: Tensor
    measures_change: bool
    reads_weight: ClassVar[bool] = True

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return self.change.rows

    @property
    def rank(self) -> int:
        """See `Layer`."""
        return self.change.rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return *self.change.tensors, self.lengths

    @property
    def cost(self) -> LayerCost:
        """That of the change: a number for each row more does not count."""
        return self.change.cost

    def apply(self, state: Composed, strength: float) -> Composed:
        """See `Layer`; a row of length 0 is refused, too."""
        if self.measures_change:
            state = self.change.add_to(state, strength)
            return state.mix(self._diagonal(self.lengths / state.row_lengths()))
        gain = self.lengths / (state.row_lengths() + torch.finfo(torch.float32).eps)
        kept = state.mix(self._diagonal(1.0 - strength + strength * gain))
        return self.change.add_to(kept, strength, gain)

    def _diagonal(self, gain: Tensor) -> Tensor:
        if not bool(torch.isfinite(gain).all()):
            raise LoraError(
                f"LoRAs: a DoRA on '{self.module}' divides by the length of a row that is 0. Use ComfyUI's Load "
                "Diffusion Model for this stack."
            )
        return gain[:, None, None]


def label(kind: str, roles: Collection[str]) -> str:
    """What a person calls a kind of change, with DoRA over it if that is among the roles."""
    return kind if ROLES.isdisjoint(roles) else f"{NAME} ({kind})"


def check(shapes: Shapes) -> None:
    """Check the lengths of rows, if there are any.

    Raises:
        LoraError: a wrong shape, lengths of columns, or both ways to say it.
    """
    out_features = shapes.target.out_features
    if "magnitude" in shapes:
        shapes.vector("magnitude", out_features)
    if "dora_scale" in shapes:
        header = shapes.headers["dora_scale"]
        if header.shape == (1, shapes.target.in_features):
            raise LoraError(
                f"{shapes.source}: '{header.key}' is a DoRA over the input's columns, which scales the weight from "
                f"the right; only one over the output's rows can be carried. {INSTEAD}"
            )
        shapes.expect("dora_scale", header.shape == (out_features, 1), f"({out_features}, 1)")
        if "magnitude" in shapes:
            shapes.expect("magnitude", False, "no second magnitude beside dora_scale")
    if "magnitude" in shapes and "up_bias" in shapes:
        shapes.expect("up_bias", False, "no bias beside DoRA")


def over(layers: Sequence[Layer], target: LoraTarget, tensors: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    """The layers under DoRA, if its lengths are among the tensors.

    Args:
        layers: what only adds to the weights, one for each part of the target, in its order.
        target: the linears.
        tensors: role -> values.
    """
    for role, measures_change in (("dora_scale", False), ("magnitude", True)):
        if role in tensors:
            lengths = split_rows(target, own_vector(tensors[role]))
            return tuple(
                MagnitudeLayer(module, layer, rows, measures_change)
                for layer, (module, rows) in zip(layers, lengths, strict=True)
            )
    return tuple(layers)
