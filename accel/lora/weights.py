"""What a LoRA is once its source is forgotten: changes of the model's linears, biases and norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import FileIdentity
from ..layout import LoraTarget, swap_halves
from ..tensors import all_finite
from .report import LoraReport


@dataclass(frozen=True)
class Magnitude:
    """What DoRA fixes the length of a weight's rows to.

    Attributes:
        rows: (out_features,) float32.
        after: whether the rows are measured with the low-rank change (PEFT's `lora_magnitude_vector`) or before it
            (ComfyUI's reading of `dora_scale`).
    """

    rows: Tensor
    after: bool


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank change of one linear: weight + scale · B @ A.

    Attributes:
        module: the diffusers linear.
        lora_A: (rank, in_features) on the CPU, in the file's dtype.
        lora_B: (out_features, rank), likewise.
        scale: alpha / rank; 1 where the file has no alpha.
        magnitude: for DoRA: the lengths of the changed weight's rows.
    """

    module: str
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    magnitude: Magnitude | None = None

    @property
    def rank(self) -> int:
        """Columns of lora_B."""
        return self.lora_B.shape[1]


@dataclass(frozen=True)
class RotationLayer:
    """A block-diagonal rotation of one linear's output (OFT): weight + s² · turn @ weight at strength s.

    Attributes:
        module: the diffusers linear.
        turn: (blocks, b, b) float32, rotation minus identity; blocks · b is out_features.
    """

    module: str
    turn: Tensor


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


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file's weights over one model's linears. Immutable; shared by everything that uses the file.

    Attributes:
        identity: the file's state when it was read.
        layers: one or more per linear that it changes, in the order in which they apply.
        text_encoder_keys: keys that belong to CLIP or T5, which the transformer does not use.
        vectors: changes of biases and norms.
        peak: no element of any lora_B is larger; infinity where that is not known.
        report: what became of the file's keys.
    """

    identity: FileIdentity
    layers: tuple[LoraLayer | RotationLayer, ...]
    text_encoder_keys: tuple[str, ...]
    vectors: tuple[VectorLayer, ...] = ()
    peak: float = math.inf
    report: LoraReport = field(default_factory=LoraReport)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.identity.name

    @property
    def bytes(self) -> int:
        """Memory that the weights hold; lora_A of a fused linear serves several layers and counts once."""
        tensors = [vector.value for vector in self.vectors]
        for layer in self.layers:
            if isinstance(layer, RotationLayer):
                tensors.append(layer.turn)
            else:
                tensors += [layer.lora_A, layer.lora_B]
        return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def split(
    target: LoraTarget,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    magnitude: Magnitude | None = None,
) -> list[LoraLayer]:
    """Give each linear of a target its rows of lora_B; lora_A serves them all."""
    if target.swap_halves:
        lora_B = swap_halves(lora_B)
        magnitude = magnitude and Magnitude(swap_halves(magnitude.rows), magnitude.after)
    layers = []
    for part in target.parts:
        rows = slice(part.start, part.start + part.rows)
        own = magnitude and Magnitude(magnitude.rows[rows], magnitude.after)
        layers.append(LoraLayer(part.module, lora_A, lora_B[rows], scale, own))
    return layers


def split_rotation(name: str, target: LoraTarget, turn: Tensor) -> list[RotationLayer]:
    """Give each linear of a target its blocks of a rotation.

    Raises:
        LoraError: a block lies across the border of two linears.
    """
    size = turn.shape[1]
    borders = [part.rows for part in target.parts] + ([target.out_features // 2] if target.swap_halves else [])
    if any(rows % size for rows in borders):
        raise LoraError(
            f"LoRA {name}: its OFT blocks of {size} rows lie across the {len(target.parts)} layers that the model "
            "splits this one into, which it cannot carry. Use ComfyUI's Load Diffusion Model for this file."
        )
    if target.swap_halves:
        turn = swap_halves(turn)
    return [
        RotationLayer(part.module, turn[part.start // size : (part.start + part.rows) // size])
        for part in target.parts
    ]


def split_bias(target: LoraTarget, value: Tensor, scale: float) -> list[VectorLayer]:
    """Give each linear of a target its part of a difference of biases."""
    if target.swap_halves:
        value = swap_halves(value)
    return [
        VectorLayer(f"{part.module}.bias", value[part.start : part.start + part.rows], scale) for part in target.parts
    ]


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        LoraError: there is one.
    """
    if not all_finite(tensor):
        raise LoraError(
            f"LoRA {name} holds NaN or infinity. Its training diverged or the file is damaged: choose another file or "
            "an earlier checkpoint."
        )


def to_float(tensor: Tensor) -> Tensor:
    """A float32 tensor with the same values; not a copy where it is one already."""
    return tensor.to(torch.float32)
