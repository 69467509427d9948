"""A recognised model file: what the loader, the LoRA reader and the engine share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Generic

import torch

from .families.base import Config, Family
from .families.layout import Layout
from .files import TensorInfo

if TYPE_CHECKING:
    from .checkpoint.source import Checkpoint


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
class ModelSpec(Generic[Config]):
    """A checkpoint that was recognised, of which nothing but the header was read.

    Attributes:
        file: the files' headers; `file.name` for messages, `file.identity` for keys.
        family: the family that it is of.
        config: its sizes, derived from the tensors' shapes.
        stored_dtype: the dtype of most of its bytes; bfloat16 for GGUF's block formats.
        stored_layout: the layout that the file follows: the family's, or diffusers' with every linear by itself.
        stored: each name of that layout -> where it lies.
        asks_for_attention: the kernels that the file asks ComfyUI for, which an engine does not heed; mostly empty.
    """

    file: Checkpoint
    family: Family[Config]
    config: Config
    stored_dtype: torch.dtype
    stored_layout: Layout | None = None
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    asks_for_attention: str = ""

    @cached_property
    def layout(self) -> Layout:
        """The family's layout of a model with these sizes."""
        return self.family.layout(self.config)

    @property
    def parameter_count(self) -> int:
        """Weights and biases in all, without scales."""
        return sum(prod(shape) for shape in self.layout.expected_shapes().values())
