"""What a LoRA is once its source is forgotten: changes of the model's linears, biases and norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LoraError
from ..families.layout import LoraTarget, swap_halves
from ..files import FileIdentity
from ..tensors import all_finite
from .read.report import LoraReport


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

    def factors(self, dtype: torch.dtype) -> tuple[float, float]:
        """What lora_A and lora_B are multiplied with when they are stored in a dtype; together that is `scale`.

        float16 has no small numbers with all digits: alpha / rank on lora_B alone, 1 / 128 for example, would cost it a
        percent of its values. Half of it goes into lora_A, as a power of two, which costs nothing there.
        """
        if dtype != torch.float16 or not 0.0 < abs(self.scale) < 1.0:
            return 1.0, self.scale
        half = 2.0 ** round(math.log2(abs(self.scale)) / 2)
        return half, self.scale / half

    @property
    def rows(self) -> int:
        """out_features of the linear."""
        return self.lora_B.shape[0]


@dataclass(frozen=True)
class KroneckerLayer:
    """A Kronecker product beside one linear (LoKr): weight + scale · rows of kron(left, right).

    Attributes:
        module: the diffusers linear.
        left: (a, b) on the CPU, in the file's dtype; of a fused linear only the rows that this part of it needs.
        right: (m, n), likewise; b · n is in_features. Parts of a fused linear share it.
        scale: what the product is multiplied with, besides the strength.
        rows: out_features of the linear.
        first: its row i is row (first + i) mod (a · m) of the product.
        magnitude: see `LoraLayer`.
    """

    module: str
    left: Tensor
    right: Tensor
    scale: float
    rows: int
    first: int = 0
    magnitude: Magnitude | None = None

    def product(self) -> Tensor:
        """The rows of kron(left, right), unscaled: (rows, in_features) float32. As large as the weight."""
        product = torch.kron(to_float(self.left), to_float(self.right))
        return product.roll(-self.first, 0)[: self.rows]


@dataclass(frozen=True)
class InputLayer:
    """A low-rank change of what one linear reads (GLoRA): weight + scale · (weight @ columns) @ lora_A.

    Attributes:
        module: the diffusers linear.
        columns: (in_features, rank) on the CPU, in the file's dtype.
        lora_A: (rank, in_features), likewise.
        scale: what the product is multiplied with, besides the strength.
        rows: out_features of the linear.
    """

    module: str
    columns: Tensor
    lora_A: Tensor
    scale: float
    rows: int

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class RotationLayer:
    """A block-diagonal rotation of one linear's output (OFT): weight + s² · turn @ weight at strength s.

    Attributes:
        module: the diffusers linear.
        turn: (blocks, b, b) float32, rotation minus identity; blocks · b is out_features.
    """

    module: str
    turn: Tensor

    @property
    def rows(self) -> int:
        """out_features of the linear."""
        return self.turn.shape[0] * self.turn.shape[1]


Layer = LoraLayer | KroneckerLayer | InputLayer | RotationLayer


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
class Adapter:
    """A LoRA over one model's linears, biases and norms. Immutable; shared by everything that uses its file.

    Attributes:
        identity: the file's state when it was read.
        layers: one or more per linear that it changes, in the order in which they apply.
        text_encoder_keys: keys that belong to CLIP or T5, which the transformer does not use.
        vectors: changes of biases and norms.
        peak: no element of any lora_B is larger; infinity where that is not known.
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
        return bool(self.vectors) or any(map(reads_weight, self.layers))

    @property
    def bytes(self) -> int:
        """Memory that it holds: all of the buffers that their tensors lie in, each counted once."""
        tensors = [vector.value for vector in self.vectors]
        for layer in self.layers:
            if isinstance(layer, RotationLayer):
                tensors.append(layer.turn)
            elif isinstance(layer, KroneckerLayer):
                tensors += [layer.left, layer.right]
            elif isinstance(layer, InputLayer):
                tensors += [layer.columns, layer.lora_A]
            else:
                tensors += [layer.lora_A, layer.lora_B]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def only_adds(layer: Layer) -> bool:
    """Whether a layer only adds to the weight, whatever that is: its strength is then a factor."""
    return not isinstance(layer, RotationLayer) and not reads_weight(layer)


def reads_weight(layer: Layer) -> bool:
    """Whether what a layer becomes depends on the weight that it changes."""
    return isinstance(layer, InputLayer) or getattr(layer, "magnitude", None) is not None


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
    magnitudes = _split_magnitude(target, magnitude)
    return [
        LoraLayer(part.module, lora_A, lora_B[part.start : part.start + part.rows], scale, own)
        for part, own in zip(target.parts, magnitudes, strict=True)
    ]


def split_kronecker(
    target: LoraTarget, left: Tensor, right: Tensor, scale: float, magnitude: Magnitude | None = None
) -> list[KroneckerLayer]:
    """Give each linear of a target its rows of a Kronecker product, which may begin and end inside a block of right's.

    Args:
        target: has a · m rows and b · n columns.
        left: (a, b).
        right: (m, n).
        scale: of the product.
        magnitude: for DoRA.
    """
    size, shift = len(right), target.out_features // 2 if target.swap_halves else 0
    layers = []
    for part, own in zip(target.parts, _split_magnitude(target, magnitude), strict=True):
        first = (part.start + shift) % target.out_features
        end = first + part.rows
        # Blocks of `size` rows that the part touches; all where it goes on at the beginning.
        begin = first // size if end <= target.out_features else 0
        blocks = left[begin : -(-end // size)] if end <= target.out_features else left
        layers.append(KroneckerLayer(part.module, blocks, right, scale, part.rows, first - begin * size, own))
    return layers


def _split_magnitude(target: LoraTarget, magnitude: Magnitude | None) -> list[Magnitude | None]:
    if magnitude is None:
        return [None] * len(target.parts)
    rows = swap_halves(magnitude.rows) if target.swap_halves else magnitude.rows
    return [Magnitude(rows[part.start : part.start + part.rows], magnitude.after) for part in target.parts]


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


def check_finite(source: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, in a message that begins with what holds them.

    Raises:
        LoraError: there is one.
    """
    if not all_finite(tensor):
        raise LoraError(
            f"{source} holds NaN or infinity. Its training diverged or the file is damaged: choose another file or "
            "an earlier checkpoint."
        )


def own_vector(tensor: Tensor) -> Tensor:
    """The values in one dimension, float32, in memory of their own: a view would keep a whole file's."""
    return tensor.flatten().to(torch.float32, copy=True)


def to_float(tensor: Tensor) -> Tensor:
    """A float32 tensor with the same values; not a copy where it is one already."""
    return tensor.to(torch.float32)
