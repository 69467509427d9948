"""A recognised model file: what the loader, the LoRA reader and the engine share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .files import TensorFile


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint that was recognised, of which nothing but the header was read.

    Attributes:
        file: the header.
        family: the family object of `accel.families` that serves it.
        config: the family's configuration, derived from the tensors' shapes.
        stored_dtype: the dtype of most of its bytes.
    """

    file: TensorFile
    family: Any
    config: Any
    stored_dtype: torch.dtype

    @property
    def parameter_count(self) -> int:
        """Weights and biases in all."""
        return sum(info.numel for info in self.file.tensors.values())
