"""What a LoRA is once its source is forgotten: changes of the model's linears, biases and norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from ..files import FileIdentity
from .kinds.layers import Layer, VectorLayer
from .read.report import LoraReport


@dataclass(frozen=True)
class Adapter:
    """A LoRA over one model's linears, biases and norms. Immutable; shared by everything that uses its file.

    Attributes:
        identity: the file's state when it was read.
        layers: one or more per linear that it changes, in the order in which they apply.
        text_encoder_keys: keys that belong to text encoders, which the transformer does not use.
        vectors: changes of biases and norms.
        peak: no element of its layers' tensors is larger in magnitude; infinity where that is not known.
        report: what became of the file's keys.
        label: what a person calls it, if that is more than the file's name.
    """

    identity: FileIdentity
    layers: tuple[Layer, ...]
    text_encoder_keys: tuple[str, ...]
    vectors: tuple[VectorLayer, ...] = ()
    peak: float = math.inf
    report: LoraReport = field(default_factory=LoraReport)
    label: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.label or self.identity.name

    @property
    def nameless(self) -> bool:
        """Whether nobody knows what it is called: it came as another node's patches, and is known by its content."""
        return not self.label and not self.identity.mtime_ns

    @property
    def changed(self) -> frozenset[str]:
        """The linears, biases and norms that it changes."""
        return frozenset([layer.module for layer in self.layers] + [vector.parameter for vector in self.vectors])

    @property
    def needs_base(self) -> bool:
        """Whether applying it takes the model's own weights."""
        return bool(self.vectors) or any(layer.reads_weight for layer in self.layers)

    @cached_property
    def only_adds(self) -> bool:
        """Whether its strength is a factor and no more: it only adds to weights, and to them alone."""
        return not self.vectors and all(layer.only_adds for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Memory that it holds: all of the buffers that its tensors lie in, each counted once."""
        tensors = [vector.value for vector in self.vectors]
        for layer in self.layers:
            tensors += layer.tensors
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
