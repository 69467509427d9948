"""The one flat buffer that a stack of LoRAs becomes before it is bound.

Stacks are exact: the ranks of all LoRAs on a linear are concatenated, A = [A₁; A₂; …], B = [s₁ B₁, s₂ B₂, …], with
strength · alpha / rank folded into B in float32. Kronecker products stay side by side, with it folded into the left
matrix. Where DoRA, OFT or GLoRA is among them, see `compose`.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LoraError
from ..tensors import all_finite
from .buffers import HostBuffers
from .compose import BaseWeights, Composed, KroneckerTerm, compose, is_plain
from .kronecker import Term
from .stack import StackEntry
from .weights import InputLayer, KroneckerLayer, Layer, LoraLayer, VectorLayer, reads_weight, to_float

# GEMMs on a GPU want sizes in multiples of 16 bytes; 16 columns serve every dtype down to float8.
RANK_ALIGNMENT = 16
# Compiled kernels assume the alignment of the pointers that they saw first.
BYTES_ALIGNMENT = 64
# What every buffer begins with, zeros: a stack of biases alone has no matrix, and not every memory gives 0 bytes.
HEAD_BYTES = BYTES_ALIGNMENT
# at::internal::GRAIN_SIZE: elementwise operations on fewer elements take one thread (ATen/Parallel.h, torch 2.14).
SERIAL_ELEMENTS = 32768
# Few enough to be in a core's cache still when they are multiplied after they were moved; many enough for few calls.
SCALED_ELEMENTS = 2**19


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

    Returns:
        The buffer on the CPU; ranks are rounded up to `RANK_ALIGNMENT` with zeros.

    Raises:
        LoraError: a strength makes a matrix overflow the dtype, or see `compose.compose`.
        ValueError: an entry needs `base`, and there is none.
    """
    with torch.inference_mode(False), torch.no_grad():
        by_module: dict[str, Layers] = defaultdict(list)
        for entry in entries:
            for layer in entry.weights.layers:
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
        buffer, placed = flat_buffer(composed, dtype, pin, buffers, room)
        _write_kroneckers(buffer, kroneckers, terms)
        vectors = {name: _store(value, dtype, pin) for name, value in _vectors(entries, base).items()}
        if not (
            ((not mixing and _fits(entries, dtype)) or all_finite(buffer))
            and all(all_finite(tensor) for tensor in (*mixing.values(), *vectors.values()))
        ):
            names = " + ".join(f"'{entry.weights.name}' × {entry.strength:g}" for entry in entries)
            raise LoraError(f"LoRA {names} overflows {dtype}: lower the strength, or choose another dtype.")
    return FlatLora(buffer, placed, mixing, vectors, kroneckers)


def flat_buffer(
    by_module: Mapping[str, Layers], dtype: torch.dtype, pin: bool, buffers: HostBuffers | None, room: Room
) -> tuple[Tensor, dict[str, Placed]]:
    """Write low-rank layers, module by module, into one buffer, behind what `room` has handed out; see `flatten`."""
    placed = _place(by_module, room)
    if pin or buffers is None:
        buffer = torch.empty(room.end, dtype=dtype, pin_memory=pin)
    else:
        buffer = buffers.take(room.end * dtype.itemsize).view(dtype)
    _write_lora_A(buffer, room.gaps, placed, by_module)
    _write_lora_B(buffer, placed, by_module)
    return buffer, placed


def _write_lora_A(
    buffer: Tensor, gaps: Sequence[tuple[int, int]], placed: Mapping[str, Placed], by_module: Mapping[str, Layers]
) -> None:
    """Write what is not scaled."""
    for start, end in gaps:
        buffer[start:end].zero_()
    filled = set()
    for module, layers in by_module.items():
        place = placed[module]
        if place.a_start not in filled:
            filled.add(place.a_start)
            if not _moved(buffer, place.a_start, place.a_shape, [layer.lora_A for layer, _ in layers]):
                _fill(buffer.as_strided(place.a_shape, (place.a_shape[1], 1), place.a_start), layers)


def _write_lora_B(buffer: Tensor, placed: Mapping[str, Placed], by_module: Mapping[str, Layers]) -> None:
    """Write strength · scale · B, rounded once: neighbours that only have to be moved are multiplied together."""
    start, end, factor = 0, 0, 1.0  # what was moved and is not multiplied yet
    for module, layers in by_module.items():
        place, (layer, strength) = placed[module], layers[0]
        own = strength * layer.scale
        if (place.b_start, own) != (end, factor) or end - start >= SCALED_ELEMENTS:
            _scale(buffer[start:end], factor)
            start, end, factor = place.b_start, place.b_start, own
        if _moved(buffer, place.b_start, place.b_shape, [layer.lora_B for layer, _ in layers]):
            end += math.prod(place.b_shape)
        else:
            _fill_scaled(buffer.as_strided(place.b_shape, (place.b_shape[1], 1), place.b_start), layers)
    _scale(buffer[start:end], factor)


def _scale(values: Tensor, factor: float) -> None:
    if factor != 1.0:
        values.mul_(factor)


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
    buffer: Tensor, placed: Mapping[str, Sequence[Term]], terms: Mapping[str, Sequence[KroneckerTerm]]
) -> None:
    """Write factor · left, rounded once, and the others as they are."""
    filled = set()
    for module, places in placed.items():
        for place, term in zip(places, terms[module], strict=True):
            left, right = place.matrices(buffer)
            torch.mul(_multipliable(term.layer.left, buffer.dtype), term.factor, out=left)
            if place.right not in filled:
                filled.add(place.right)
                if not _moved(buffer, place.right, right.shape, [term.layer.right]):
                    right.copy_(term.layer.right)
            if term.mixing is not None:
                place.blocks(buffer, term.layer.rows).copy_(term.mixing.flatten())


def _moved(buffer: Tensor, start: int, shape: tuple[int, int], matrices: Sequence[Tensor]) -> bool:
    """Move a matrix to its place if it is there byte for byte as it will be; False: it must be converted or joined.

    Without torch, whose calls take as long for a small matrix as the copy, and without the interpreter's lock.
    """
    matrix = matrices[0]
    as_it_is = matrix.dtype == buffer.dtype and matrix.shape == shape and matrix.is_contiguous() and matrix.is_cpu
    if len(matrices) > 1 or not as_it_is:
        return False
    ctypes.memmove(buffer.data_ptr() + start * buffer.element_size(), matrix.data_ptr(), matrix.nbytes)
    return True


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
        for vector in entry.weights.vectors:
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
        scales = {layer.scale for layer in entry.weights.layers if isinstance(layer, LoraLayer)}
        bounds = [entry.weights.peak * factor for factor in (1.0, *(abs(entry.strength * scale) for scale in scales))]
        if not all(bound <= largest for bound in bounds):  # nor where one is NaN
            return False
    return True


def aligned_rank(rank: int) -> int:
    """The rank that a matrix of this rank is stored with."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def _place(by_module: Mapping[str, Layers], room: Room) -> dict[str, Placed]:
    """Where the low-rank matrices lie."""
    downs: dict[str, tuple[int, tuple[int, int]]] = {}
    shared: dict[tuple[int, ...], int] = {}
    for module, layers in by_module.items():
        rank = aligned_rank(sum(layer.rank for layer, _ in layers))
        first = layers[0][0]
        # q, k and v of a fused file have the same lora_A: stored once, copied once, read from the cache.
        same = tuple(id(layer.lora_A) for layer, _ in layers)
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


def _fill(target: Tensor, layers: Layers) -> None:
    start = 0
    for layer, _ in layers:
        for part, lora_A in _serial(target[start : start + layer.rank], layer.lora_A):
            part.copy_(lora_A)
        start += layer.rank
    if start < len(target):
        target[start:].zero_()


def _fill_scaled(target: Tensor, layers: Layers) -> None:
    """Write strength · scale · B, rounded once, without a temporary where the kernel computes in float32 by itself."""
    start = 0
    for layer, strength in layers:
        lora_B = _multipliable(layer.lora_B, target.dtype)
        for part, values in _serial(target.narrow(1, start, layer.rank), lora_B):
            torch.mul(values, strength * layer.scale, out=part)
        start += layer.rank
    if start < target.shape[1]:
        target[:, start:].zero_()


def _multipliable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values, of a dtype whose product with a number torch writes into this one without rounding before."""
    return values if values.dtype in (dtype, torch.float32) else values.float()


def _serial(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, in parts that torch works on with the calling thread alone.

    A thousand small operations that wait for other threads each take five times as long on a machine that is busy.
    """
    rows = max(1, (SERIAL_ELEMENTS - 1) // max(1, target.shape[1]))
    if rows >= len(target):
        yield target, source
    else:
        yield from zip(target.split(rows), source.split(rows), strict=True)
