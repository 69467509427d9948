"""How the tensors of an original checkpoint become the modules of a diffusers model.

One table serves the loader and the LoRA reader: a fused linear of the checkpoint is a list of modules, each a run of
its rows, so a LoRA over the fused linear splits in the same places as its weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

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
    """A linear of the original checkpoint, (out_features, in_features).

    Attributes:
        name: the checkpoint's name without `.weight`, such as `double_blocks.0.img_attn.qkv`.
        parts: the diffusers linears that it holds, in row order, covering all rows.
        swap_halves: the checkpoint stores (shift, scale), diffusers wants (scale, shift).
        narrow_in_features: of the same linear in models that read less, whose inputs are the first of this one's; 0
            where there are none.
        bias: whether it has one, (out_features,).
        per_picture: whether it runs once per picture, not on every token, as a modulation does.
    """

    name: str
    in_features: int
    parts: tuple[LinearPart, ...]
    swap_halves: bool = False
    narrow_in_features: int = 0
    bias: bool = True
    per_picture: bool = False

    @classmethod
    def of(cls, name: str, in_features: int, *parts: tuple[str, int], **options: Any) -> FusedLinear:
        """A linear of parts that follow one another, each (module, rows); options are the other attributes."""
        start, placed = 0, []
        for module, rows in parts:
            placed.append(LinearPart(module, start, rows))
            start += rows
        return cls(name, in_features, tuple(placed), **options)

    @property
    def out_features(self) -> int:
        """Rows of the fused weight."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class ModelLinear:
    """One linear of the diffusers model.

    Attributes:
        module: its full name.
        bias: whether it has one, (out_features,).
        per_picture: whether it runs once per picture, not on every token.
        block: the block that it is part of, see `Layout.blocks`; None: it is outside.
    """

    module: str
    out_features: int
    in_features: int
    bias: bool
    per_picture: bool
    block: int | None

    @property
    def quantizable(self) -> bool:
        """Whether its weight may be stored in fewer bits: inside the blocks.

        The embedders and the final layer stay. They are 0.5 % of FLUX.1's weights, so there is nothing to gain; but
        every token, every block's conditioning and every pixel pass through them once, unaveraged.
        """
        return self.block is not None


@dataclass(frozen=True)
class LoraTarget:
    """The linears that one module name of a LoRA file means.

    Attributes:
        parts: the diffusers linears; lora_B's rows are split among them, lora_A serves each.
        in_features: columns of lora_A.
        out_features: rows of lora_B.
        swap_halves: lora_B's rows stand in the original checkpoint's order, see `FusedLinear`.
        bias: whether the linears have biases that a LoRA can change.
        narrow_in_features: columns of lora_A in a LoRA for models that read less, see `FusedLinear`.
    """

    parts: tuple[LinearPart, ...]
    in_features: int
    out_features: int
    swap_halves: bool
    bias: bool
    narrow_in_features: int = 0

    @classmethod
    def whole(cls, linear: FusedLinear) -> LoraTarget:
        """All of a linear, in the checkpoint's order."""
        return cls(
            linear.parts,
            linear.in_features,
            linear.out_features,
            linear.swap_halves,
            linear.bias,
            linear.narrow_in_features,
        )


@dataclass(frozen=True)
class VectorWeight:
    """A one-dimensional tensor, such as the scale of an RMS norm: the checkpoint's key, the diffusers parameter."""

    name: str
    parameter: str
    size: int


@dataclass(frozen=True)
class Layout:
    """Every tensor that a checkpoint of one configuration holds.

    Attributes:
        linears: those of blocks in the order in which blocks run; those outside may stand anywhere.
        vectors: everything that is no linear's.
        blocks: the diffusers modules that are blocks, such as `transformer_blocks.0`, in the order in which they run.
    """

    linears: tuple[FusedLinear, ...]
    vectors: tuple[VectorWeight, ...]
    blocks: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every diffusers linear, in the order of `linears`."""
        return tuple(self.by_module)

    @cached_property
    def by_module(self) -> Mapping[str, ModelLinear]:
        """Every diffusers linear by its name, in the order of `linears`."""
        return {
            part.module: ModelLinear(
                part.module,
                part.rows,
                linear.in_features,
                linear.bias,
                linear.per_picture,
                self.block_of(part.module),
            )
            for linear in self.linears
            for part in linear.parts
        }

    @cached_property
    def width(self) -> int:
        """The hidden size: what most linears in blocks read."""
        widths = Counter(linear.in_features for linear in self.by_module.values() if linear.block is not None)
        return widths.most_common(1)[0][0]

    @cached_property
    def _block_numbers(self) -> Mapping[str, int]:
        return {block: number for number, block in enumerate(self.blocks)}

    def block_of(self, name: str) -> int | None:
        """Which of `blocks` a module or parameter is part of, counted from 0; None: it is outside."""
        dot = name.find(".")
        while dot >= 0:
            number = self._block_numbers.get(name[:dot])
            if number is not None:
                return number
            dot = name.find(".", dot + 1)
        return self._block_numbers.get(name)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor, as the original checkpoint names them."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        for vector in self.vectors:
            shapes[vector.name] = (vector.size,)
        return shapes

    def separate(self, fused: Mapping[str, str] = MappingProxyType({})) -> Layout:
        """The same model as diffusers saves it: every part by itself, under its module's name, in its order of rows.

        Args:
            fused: linears that diffusers does not take apart either -> what it calls them.
        """
        linears: list[FusedLinear] = []
        for linear in self.linears:
            options = {"bias": linear.bias, "per_picture": linear.per_picture}
            parts = [(part.module, part.rows) for part in linear.parts]
            groups = [(fused[linear.name], parts)] if linear.name in fused else [(part[0], [part]) for part in parts]
            linears += [FusedLinear.of(name, linear.in_features, *group, **options) for name, group in groups]
        vectors = tuple(VectorWeight(vector.parameter, vector.parameter, vector.size) for vector in self.vectors)
        return Layout(tuple(linears), vectors, self.blocks)


def swap_halves(rows: Tensor) -> Tensor:
    """Exchange the first and the second half of the rows: (shift, scale) to (scale, shift)."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])
