"""OFT: a linear's output rotated block by block; the formula stands in `kinds`.

The square of the strength is ComfyUI's, which multiplies by the strength twice. BOFT, whose blocks have four
dimensions, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget, swap_halves
from ...tensors import to_float
from .base import ALPHA, Change, ComfyAdapter, Converted, Kind, Values
from .composed import Composed
from .layers import Layer, LayerCost
from .shapes import INSTEAD, Shapes


@dataclass(frozen=True)
class RotationLayer(Layer):
    """A block-diagonal rotation of one linear's output: weight + s² · delta @ weight at strength s.

    Attributes:
        delta: (blocks, b, b) float32, rotation minus identity; blocks · b is out_features.
    """

    delta: Tensor

    @property
    def rows(self) -> int:
        """See `Layer`."""
        return self.delta.shape[0] * self.delta.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Layer`."""
        return (self.delta,)

    @property
    def cost(self) -> LayerCost:
        """See `Layer`."""
        return LayerCost(self.delta.numel(), self.delta.numel())

    def apply(self, state: Composed, strength: float) -> Composed:
        """See `Layer`."""
        return state.mix(torch.eye(self.delta.shape[1]) + strength**2 * self.delta)


class Oft(Kind):
    """Orthogonal finetuning of a linear's output, as LyCORIS writes it."""

    name: ClassVar[str] = "OFT"
    endings: ClassVar[Mapping[str, str]] = {".oft_blocks": "oft_blocks", ".rescale": "rescale"}
    companions: ClassVar[tuple[str, ...]] = (ALPHA,)  # not a scale here, but a bound on the rotation
    sized_by_linear: ClassVar[bool] = False  # ComfyUI reads BOFT for text encoders, too
    comfyui: ClassVar[ComfyAdapter] = ComfyAdapter("OFTAdapter", ("oft_blocks", "rescale", ALPHA, "dora_scale"))

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        shapes.need("oft_blocks", "oft_blocks")
        header, out_features = shapes.headers["oft_blocks"], shapes.target.out_features
        shape = header.shape
        if len(shape) == 4:
            raise LoraError(
                f"{shapes.source}: '{header.key}' is BOFT, whose butterfly mixes all rows of the weight: carrying it "
                f"beside the weight would take a matrix of the weight's size. {INSTEAD}"
            )
        good = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == out_features and shape[1] > 1
        shapes.expect("oft_blocks", good, f"(blocks, b, b) with blocks · b = {out_features}")
        if "rescale" in shapes:
            shapes.expect("rescale", shapes.numel("rescale") == out_features, f"{out_features} numbers")
        return 0

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        return Converted(_split(change, _rotation_delta(change, values.tensors)))


def _rotation_delta(change: Change, tensors: Mapping[str, Tensor]) -> Tensor:
    """(R - I)ᵀ of the rotations R that the blocks define: (blocks, b, b) float32.

    Raises:
        LoraError: the file rescales the rotated weight.
    """
    if "rescale" in tensors and bool((to_float(tensors["rescale"]) != 1.0).any()):
        raise LoraError(
            f"{change.source}: '{change.headers['rescale'].key}' rescales the rotated weight, which ComfyUI leaves "
            f"out; what it should look like is not defined. {INSTEAD}"
        )
    blocks = tensors["oft_blocks"].double()
    skew = blocks - blocks.transpose(1, 2)
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
    if alpha > 0.0:
        length = float(skew.norm()) + 1e-8
        skew = skew * min(1.0, alpha / length)
    identity = torch.eye(blocks.shape[1], dtype=torch.float64)
    rotation = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return (rotation - identity).transpose(1, 2).float().contiguous()


def _split(change: Change, delta: Tensor) -> tuple[RotationLayer, ...]:
    """Give each linear of a target its blocks of a rotation.

    Args:
        change: its target has blocks · b rows.
        delta: (blocks, b, b) float32.

    Raises:
        LoraError: a block crosses two linears, or two halves that change places.
    """
    target, size = change.target, delta.shape[1]
    if any(rows % size for rows in _borders(target)):
        raise LoraError(
            f"{change.source}: '{change.name}': its OFT blocks of {size} rows lie across the {len(target.parts)} "
            "layers that the model splits this one into, which it cannot carry. Use ComfyUI's Load Diffusion Model "
            "for this file."
        )
    if target.swap_halves:
        delta = swap_halves(delta)
    return tuple(
        RotationLayer(part.module, delta[part.start // size : (part.start + part.rows) // size])
        for part in target.parts
    )


def _borders(target: LoraTarget) -> list[int]:
    """Numbers of rows after which no block may go on."""
    return [part.rows for part in target.parts] + ([target.out_features // 2] if target.swap_halves else [])
