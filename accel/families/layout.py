"""How the tensors of an original checkpoint become the modules of a diffusers model.

One table serves the loader and the LoRA reader: a fused linear of the checkpoint is a list of modules, each a run of
its rows, so a LoRA over the fused linear splits in the same places as its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearPart:
    """One diffusers linear, and which rows of the fused one it is.

    Attributes:
        module: the diffusers module, such as `transformer_blocks.0.attn.to_q`.
        start: its first row in the fused weight.
        rows: its out-features.
    """

    module: str
    start: int
    rows: int


@dataclass(frozen=True)
class FusedLinear:
    """A linear of the original checkpoint, (out_features, in_features), with a bias.

    Attributes:
        name: the checkpoint's name without `.weight`, such as `double_blocks.0.img_attn.qkv`.
        parts: the diffusers linears that it holds, in row order, covering all rows.
        swap_halves: the checkpoint stores (shift, scale), diffusers wants (scale, shift).
        narrow: in_features of the same linear in models that read less, whose inputs are the first of this one's; 0
            where there are none.
    """

    name: str
    in_features: int
    parts: tuple[LinearPart, ...]
    swap_halves: bool = False
    narrow: int = 0

    @property
    def out_features(self) -> int:
        """Rows of the fused weight."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class LoraTarget:
    """The linears that one module name of a LoRA file means.

    Attributes:
        parts: the diffusers linears; lora_B's rows are split among them, lora_A serves each.
        in_features: columns of lora_A.
        out_features: rows of lora_B.
        swap_halves: lora_B's rows stand in the original checkpoint's order, see `FusedLinear`.
        narrow: columns of lora_A in a LoRA for models that read less, see `FusedLinear`.
    """

    parts: tuple[LinearPart, ...]
    in_features: int
    out_features: int
    swap_halves: bool
    narrow: int = 0

    @classmethod
    def whole(cls, linear: FusedLinear) -> LoraTarget:
        """All of a linear, in the checkpoint's order."""
        return cls(linear.parts, linear.in_features, linear.out_features, linear.swap_halves, linear.narrow)


@dataclass(frozen=True)
class VectorWeight:
    """A one-dimensional tensor, such as the scale of an RMS norm: the checkpoint's key, the diffusers parameter."""

    name: str
    parameter: str
    size: int


@dataclass(frozen=True)
class Layout:
    """Every tensor that a checkpoint of one configuration holds."""

    linears: tuple[FusedLinear, ...]
    vectors: tuple[VectorWeight, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every diffusers linear, in the order in which they run."""
        return tuple(part.module for linear in self.linears for part in linear.parts)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor, as the original checkpoint names them."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            shapes[f"{linear.name}.bias"] = (linear.out_features,)
        for vector in self.vectors:
            shapes[vector.name] = (vector.size,)
        return shapes

    def separate(self) -> Layout:
        """The same model as diffusers saves it: every part by itself, under its module's name, in its order of rows."""
        linears = tuple(
            FusedLinear(part.module, linear.in_features, (LinearPart(part.module, 0, part.rows),))
            for linear in self.linears
            for part in linear.parts
        )
        vectors = tuple(VectorWeight(vector.parameter, vector.parameter, vector.size) for vector in self.vectors)
        return Layout(linears, vectors)


def swap_halves(rows: Tensor) -> Tensor:
    """Exchange the first and the second half of the rows: (shift, scale) to (scale, shift)."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])
