"""The shapes of one change's tensors before its values are read, and what is wrong with one that is not as expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import LoraError
from ...families.layout import LoraTarget

OTHER = "this file is for a model of another size or kind. Choose a LoRA that was trained for this model."
INSTEAD = "Choose a LoRA without it, or use ComfyUI's Load Diffusion Model for this one."


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a change before its values are read: what messages call it, and its shape."""

    key: str
    shape: tuple[int, ...]


class Shapes:
    """Checks the shapes of one change and words what is wrong with one. Its methods raise `LoraError`.

    Attributes:
        source: what messages begin with, such as `LoRA 'x.safetensors'`.
        name: the layer as the source calls it.
        target: the linears that it means.
        headers: role -> tensor.
    """

    def __init__(self, source: str, name: str, target: LoraTarget, headers: Mapping[str, TensorHeader]) -> None:
        self.source, self.name, self.target, self.headers = source, name, target, headers

    def __contains__(self, role: str) -> bool:
        return role in self.headers

    def matrix(self, role: str) -> tuple[int, int]:
        """Rows and columns of a matrix, which may be stored as a 1x1 convolution."""
        shape = self.headers[role].shape
        if len(shape) < 2 or any(size != 1 for size in shape[2:]) or 0 in shape:
            raise LoraError(
                f"{self.source}: '{self.headers[role].key}' is {shape}, expected a matrix (or a 1x1 convolution): "
                f"{OTHER}"
            )
        return shape[0], shape[1]

    def expect(self, role: str, good: bool, expected: str) -> None:
        """Raise unless a shape is as expected."""
        if not good:
            header = self.headers[role]
            raise LoraError(f"{self.source}: '{header.key}' is {header.shape}, expected {expected}: {OTHER}")

    def vector(self, role: str, size: int) -> None:
        """Raise unless a tensor has so many elements in one dimension."""
        self.expect(role, size in self.headers[role].shape and self.numel(role) == size, f"({size},)")

    def need(self, role: str, word: str) -> None:
        """Raise unless a role is there."""
        if role not in self.headers:
            keys = ", ".join(header.key for header in self.headers.values())
            raise LoraError(
                f"{self.source}: '{self.name}' has {keys} but no {word} matrix. The file is incomplete: get it again."
            )

    def numel(self, role: str) -> int:
        """How many numbers a tensor holds."""
        return math.prod(self.headers[role].shape)
