"""The one flat buffer that a stack of LoRAs becomes before it is bound.

Stacks are exact: the ranks of all LoRAs on a linear are concatenated, A = [A₁; A₂; …], B = [s₁ B₁, s₂ B₂, …], with
strength · alpha / rank folded into B in float32 (in float16 partly into A, see `LoraLayer.factors`). Kronecker products
stay side by side, with it folded into the left matrix. Where DoRA, OFT or GLoRA is among them, see `compose`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...linear.kronecker import Term
from ...memory.buffers import BYTES_ALIGNMENT, HostBuffers
from ...memory.garbage import collected_later
from ...tensors import all_finite
from ..adapter import InputLayer, KroneckerLayer, Layer, LoraLayer, VectorLayer, reads_weight, to_float
from ..stack import StackEntry, overflow
from .compose import BaseWeights, Composed, KroneckerTerm, compose, is_plain
from .write import Scaled, Writer

# GEMMs on a GPU want sizes in multiples of 16 bytes; 16 columns serve every dtype down to float8.
RANK_ALIGNMENT = 16
# What every buffer begins with, zeros: a stack of biases alone has no matrix, and not every memory gives 0 bytes.
HEAD_BYTES = BYTES_ALIGNMENT


@dataclass(frozen=True)
class Placed:
    """Where one linear's matrices lie in the flat buffer, in elements."""

    a_start: int
    a_shape: tuple[int, int]
    b_start: int
    b_shape: tuple[int, int]


@dataclass(frozen=True)
class FlatLora:
    """A stack, ready to bind: every matrix of it in one buffer.

    Attributes:
        buffer: (elements,) of the transformer's dtype, on the host or the device: what belongs to Kronecker products,
            then every lora_A, then every lora_B.
        placed: module -> its place. Linears of one fused layer share their lora_A.
        mixing: module -> (blocks, b, b) of the same dtype: a block-diagonal matrix that the base linear's output,
            without its bias, is multiplied with before the LoRA is added. b = 1 scales rows (DoRA).
        vectors: parameter -> (size,) of the same dtype: biases and norms that stand in the place of the base's.
        kroneckers: module -> its Kronecker products. Linears of one fused layer share their right matrix.
    """

    buffer: Tensor
    placed: Mapping[str, Placed]
    mixing: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    kroneckers: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in (self.buffer, *self.mixing.values(), *self.vectors.values()))


Layers = list[tuple[Layer, float]]


class Room:
    """Hands out aligned places in a buffer, one behind the other.

    Attributes:
        end: elements that the buffer must have so far.
        gaps: (first, behind the last) of elements that belong to nothing.
    """

    def __init__(self, dtype: torch.dtype, start: int | None = None) -> None:
        """Begin at an element, by default behind the buffer's head."""
        self._step = BYTES_ALIGNMENT // dtype.itemsize
        self.end = HEAD_BYTES // dtype.itemsize if start is None else start
        self.gaps = [(0, self.end)]

    def take(self, elements: int) -> int:
        """The first element of a new place."""
        start, self.end = self.end, self.end + -(-elements // self._step) * self._step
        if start + elements < self.end:
            self.gaps.append((start + elements, self.end))
        return start


def flatten(
    entries: Sequence[StackEntry],
    dtype: torch.dtype,
    pin: bool,
    base: BaseWeights | None = None,
    buffers: HostBuffers | None = None,
    order: Sequence[str] = (),
    *,
    background: bool = False,
) -> FlatLora:
    """Concatenate, scale and cast a stack into one flat host buffer.

    Args:
        entries: at least one; strengths are not 0.
        dtype: the transformer's dtype.
        pin: whether to use page-locked memory, from which a copy to a CUDA device is asynchronous and twice as fast.
        base: the model's weights, for DoRA and for changes of biases and norms.
        buffers: where memory comes from that is not page-locked; None takes it from the system, which is slower.
        order: modules in the order in which they run. lora_A of linears that read the same input then adjoin, and one
            product serves them all, see `operators`.
        background: see `write.Writer`.

    Returns:
        The buffer on the CPU; ranks are rounded up to `RANK_ALIGNMENT` with zeros.

    Raises:
        LoraError: a strength makes a matrix overflow the dtype, or see `compose.compose`.
        ValueError: an entry needs `base`, and there is none.
    """
    with torch.inference_mode(False), torch.no_grad(), collected_later():
        by_module: dict[str, Layers] = defaultdict(list)
        for entry in entries:
            for layer in entry.adapter.layers:
                by_module[layer.module].append((layer, entry.strength))
        ordered = [module for module in order if module in by_module] or list(by_module)
        mixing: dict[str, Tensor] = {}
        composed: dict[str, Layers] = {}
        terms: dict[str, Sequence[KroneckerTerm]] = {}
        for module in ordered:
            low_rank, products, mixed = _divide(module, by_module[module], base)
            if low_rank:
                composed[module] = low_rank
            if products:
                terms[module] = products
            if mixed is not None:
                mixing[module] = _store(mixed, dtype, pin)
        room = Room(dtype)
        kroneckers = _place_kroneckers(terms, room)
        buffer, placed = flat_buffer(composed, dtype, pin, buffers, room, background=background)
        _write_kroneckers(Writer(buffer, background=background), kroneckers, terms)
        vectors = {name: _store(value, dtype, pin) for name, value in _vectors(entries, base).items()}
        if not (
            ((not mixing and _fits(entries, dtype)) or all_finite(buffer))
            and all(all_finite(tensor) for tensor in (*mixing.values(), *vectors.values()))
        ):
            raise overflow(entries, dtype)
    return FlatLora(buffer, placed, mixing, vectors, kroneckers)


def flat_buffer(
    by_module: Mapping[str, Layers],
    dtype: torch.dtype,
    pin: bool,
    buffers: HostBuffers | None,
    room: Room,
    *,
    background: bool = False,
) -> tuple[Tensor, dict[str, Placed]]:
    """Write low-rank layers, module by module, into one buffer, behind what `room` has handed out; see `flatten`."""
    placed = _place(by_module, dtype, room)
    if pin or buffers is None:
        buffer = torch.empty(room.end, dtype=dtype, pin_memory=pin)
    else:
        buffer = buffers.take(room.end * dtype.itemsize).view(dtype)
    for start, end in room.gaps:
        buffer[start:end].zero_()
    writer, filled = Writer(buffer, background=background), set()
    for module, layers in by_module.items():
        place = placed[module]
        if place.a_start not in filled:
            filled.add(place.a_start)
            terms = [Scaled(layer.lora_A, layer.factors(dtype)[0]) for layer, _ in layers]
            writer.write(place.a_start, place.a_shape, terms)
    for module, layers in by_module.items():
        place = placed[module]
        terms = [Scaled(layer.lora_B, strength * layer.factors(dtype)[1]) for layer, strength in layers]
        writer.write(place.b_start, place.b_shape, terms, axis=1)
    writer.finish()
    return buffer, placed


def _place_kroneckers(terms: Mapping[str, Sequence[KroneckerTerm]], room: Room) -> dict[str, tuple[Term, ...]]:
    """Right matrices and mixings, then every left matrix: another strength is then one product over these."""
    rights: dict[int, int] = {}
    mixings: list[int] = []
    for term in (term for of_module in terms.values() for term in of_module):
        right = term.layer.right
        if id(right) not in rights:
            rights[id(right)] = room.take(right.numel())
        mixings.append(0 if term.mixing is None else room.take(term.mixing.numel()))
    mixing = iter(mixings)
    placed: dict[str, tuple[Term, ...]] = {}
    for module, of_module in terms.items():
        found = []
        for term in of_module:
            layer, width = term.layer, 0 if term.mixing is None else term.mixing.shape[1]
            sides = (room.take(layer.left.numel()), *layer.left.shape, rights[id(layer.right)], *layer.right.shape)
            found.append(Term(*sides, layer.first, next(mixing), width))
        placed[module] = tuple(found)
    return placed


def _write_kroneckers(
    writer: Writer, placed: Mapping[str, Sequence[Term]], terms: Mapping[str, Sequence[KroneckerTerm]]
) -> None:
    """Write factor · left, rounded once, and the others as they are."""
    filled = set()
    for module, places in placed.items():
        for place, term in zip(places, terms[module], strict=True):
            layer = term.layer
            writer.write(place.left, layer.left.shape, [Scaled(layer.left, term.factor)])
            if place.right not in filled:
                filled.add(place.right)
                writer.write(place.right, layer.right.shape, [Scaled(layer.right, 1.0)])
            if term.mixing is not None:
                place.blocks(writer.buffer, layer.rows).copy_(term.mixing.flatten())
    writer.finish()


def _divide(
    module: str, layers: Layers, base: BaseWeights | None
) -> tuple[Layers, Sequence[KroneckerTerm], Tensor | None]:
    """What layers become: low-rank ones, Kronecker products, and what the base's output is mixed with."""
    if is_plain(layers):
        low_rank = [(layer, strength) for layer, strength in layers if isinstance(layer, LoraLayer)]
        kroneckers = [
            KroneckerTerm(layer, strength * layer.scale)
            for layer, strength in layers
            if isinstance(layer, KroneckerLayer)
        ]
        return low_rank, kroneckers, None
    result = _compose(module, layers, base)
    before = [layer for layer, _ in layers if isinstance(layer, (LoraLayer, InputLayer))]
    # lora_A is what it was, so that the linears of a fused layer go on sharing it.
    columns = result.lora_B.split([layer.rank for layer in before], dim=1) if before else ()
    low_rank = [
        (LoraLayer(module, layer.lora_A, lora_B, 1.0), 1.0) for layer, lora_B in zip(before, columns, strict=True)
    ]
    return low_rank, result.kroneckers, result.mixing


def _compose(module: str, layers: Layers, base: BaseWeights | None) -> Composed:
    if base is None and any(reads_weight(layer) for layer, _ in layers):
        raise ValueError(f"'{module}' has a DoRA or GLoRA, which needs the base weights.")
    low_rank = [layer for layer, _ in layers if isinstance(layer, (LoraLayer, InputLayer))]
    shape = layers[0][0].rows, low_rank[0].lora_A.shape[1] if low_rank else 0
    return compose(module, layers, base, shape)


def _vectors(entries: Sequence[StackEntry], base: BaseWeights | None) -> dict[str, Tensor]:
    """Parameter -> its value under the stack, float32."""
    values: dict[str, Tensor] = {}
    for entry in entries:
        for vector in entry.adapter.vectors:
            values[vector.parameter] = _changed(values.get(vector.parameter), vector, entry.strength, base)
    return values


def _changed(value: Tensor | None, vector: VectorLayer, strength: float, base: BaseWeights | None) -> Tensor:
    if vector.replaces:
        return vector.value
    if value is None:
        if base is None:
            raise ValueError(f"a change of '{vector.parameter}' needs the base weights.")
        value = to_float(base.parameter(vector.parameter).detach().cpu())
    return value + strength * vector.scale * vector.value


def _store(value: Tensor, dtype: torch.dtype, pin: bool) -> Tensor:
    stored = torch.empty(value.shape, dtype=dtype, pin_memory=pin)
    return stored.copy_(value)


def _fits(entries: Sequence[StackEntry], dtype: torch.dtype) -> bool:
    """Whether no element can overflow, from what is known without looking at it."""
    largest = torch.finfo(dtype).max
    for entry in entries:
        scales = {layer.factors(dtype)[1] for layer in entry.adapter.layers if isinstance(layer, LoraLayer)}
        bounds = [entry.adapter.peak * factor for factor in (1.0, *(abs(entry.strength * scale) for scale in scales))]
        if not all(bound <= largest for bound in bounds):  # nor where one is NaN
            return False
    return True


def aligned_rank(rank: int) -> int:
    """The rank that a matrix of this rank is stored with."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def _place(by_module: Mapping[str, Layers], dtype: torch.dtype, room: Room) -> dict[str, Placed]:
    """Where the low-rank matrices lie."""
    downs: dict[str, tuple[int, tuple[int, int]]] = {}
    shared: dict[tuple[tuple[int, float], ...], int] = {}
    for module, layers in by_module.items():
        rank = aligned_rank(sum(layer.rank for layer, _ in layers))
        first = layers[0][0]
        # q, k and v of a fused file have the same lora_A: stored once, copied once, read from the cache.
        same = tuple((id(layer.lora_A), layer.factors(dtype)[0]) for layer, _ in layers)
        a_shape = (rank, first.lora_A.shape[1])
        if same not in shared:
            shared[same] = room.take(math.prod(a_shape))
        downs[module] = shared[same], a_shape
    # Every lora_B behind every lora_A: another strength is one product over one stretch of memory, see rescale.py.
    placed: dict[str, Placed] = {}
    for module, (a_start, a_shape) in downs.items():
        b_shape = by_module[module][0][0].lora_B.shape[0], a_shape[0]
        placed[module] = Placed(a_start, a_shape, room.take(math.prod(b_shape)), b_shape)
    return placed
