"""A recognised model file: what the loader, the LoRA reader and the engine share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from .families.layout import Layout
from .files import TensorInfo


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of the layout lies in its file.

    Attributes:
        key: its name there.
        info: its shape and dtype.
        scale: the name of the scale, one for all or one per row, that its values are multiplied by; None without.
        scale_numel: how many scales that are.
    """

    key: str
    info: TensorInfo
    scale: str | None = None
    scale_numel: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, whatever it is packed into."""
        return self.info.shape


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint that was recognised, of which nothing but the header was read.

    Attributes:
        file: the files' headers, a `checkpoint.source.Checkpoint`; `file.name` for messages, `file.identity` for keys.
        family: the family object of `accel.families` that serves it.
        config: the family's configuration, derived from the tensors' shapes.
        stored_dtype: the dtype of most of its bytes; bfloat16 for GGUF's block formats.
        stored_layout: the layout that the file follows: the family's, or diffusers' with every linear by itself.
        stored: each name of that layout -> where it lies.
        asks_for_attention: the kernels that the file asks ComfyUI for, which an engine does not heed; mostly empty.
    """

    file: Any
    family: Any
    config: Any
    stored_dtype: torch.dtype
    stored_layout: Layout | None = None
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    asks_for_attention: str = ""

    @property
    def parameter_count(self) -> int:
        """Weights and biases in all, without scales."""
        return sum(prod(shape) for shape in self.family.layout(self.config).expected_shapes().values())
