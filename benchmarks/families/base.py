"""What benchmarks need of a model family beside what `accel.families` says of it.

All of them have double and single blocks, which is what most benchmarks measure one of each of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from accel.families.base import Family, FamilyConfig
from accel.families.layout import Layout
from accel.families.streams.inputs import StreamInputs
from accel.families.streams.positions import Positions

Make = Callable[..., Tensor]
"""Makes a tensor of a shape, in the compute dtype and on the device of what is measured."""


class Config(FamilyConfig, Protocol):
    """The sizes of a model of double and single blocks. A frozen dataclass."""

    @property
    def hidden_size(self) -> int:
        """Width of a token."""

    @property
    def depth(self) -> int:
        """Double blocks."""

    @property
    def depth_single(self) -> int:
        """Single blocks."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens a block reads."""

    image: int
    text: int

    @property
    def all(self) -> int:
        """Of both kinds."""
        return self.image + self.text


@dataclass(frozen=True)
class Arguments:
    """What a block of each kind is called with."""

    double: tuple[Any, ...]
    single: tuple[Any, ...]


@dataclass(frozen=True)
class BenchmarkFamily:
    """One family.

    Attributes:
        family: what the pack knows of it.
        positions: of its tokens.
        quick: the sizes of a narrow model, for `--quick`.
        one_of_each: width -> a model of one double and one single block, with nothing large around them that its width
            does not ask for.
        diffusers_layout: config -> the linears as diffusers' own model has them, under its names.
        ours: config, what makes tensors, and the rotary table -> what the regions read behind block and tokens.
        theirs: config, what makes tensors, tokens, and cosines and sines, (N, D) each -> what diffusers' own blocks are
            called with inside its model.
        forward_inputs: config, what makes tensors, side of the latent, text tokens -> inputs of one forward.
    """

    family: Family[Any]
    positions: Positions
    quick: Config
    one_of_each: Callable[[int], Config]
    diffusers_layout: Callable[[Any], Layout]
    ours: Callable[[Any, Make, Tensor], Arguments]
    theirs: Callable[[Any, Make, Tokens, tuple[Tensor, Tensor]], Arguments]
    forward_inputs: Callable[[Any, Make, int, int], StreamInputs]
