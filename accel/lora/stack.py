"""Stacks of LoRAs, and the one flat buffer that a stack becomes before it is bound.

Stacks are exact: the ranks of all LoRAs on a linear are concatenated, A = [A₁; A₂; …], B = [s₁ B₁, s₂ B₂, …], with
strength · alpha / rank folded into B in float32. Where DoRA or OFT is among them, see `compose`.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import FileIdentity
from ..tensors import all_finite
from .buffers import HostBuffers
from .compose import BaseWeights, Composed, compose, is_plain
from .weights import LoraLayer, LoraWeights, RotationLayer, VectorLayer, to_float

# GEMMs on a GPU want sizes in multiples of 16 bytes; 16 columns serve every dtype down to float8.
RANK_ALIGNMENT = 16
# Compiled kernels assume the alignment of the pointers that they saw first.
BYTES_ALIGNMENT = 64
# No matrix starts at the very beginning of a buffer: dynamo makes a storage offset of 0 a constant and every other one
# a symbol, so a matrix at offset 0 would recompile what a matrix elsewhere compiled.
HEAD_BYTES = BYTES_ALIGNMENT
# at::internal::GRAIN_SIZE: elementwise operations on fewer elements take one thread (ATen/Parallel.h, torch 2.14).
SERIAL_ELEMENTS = 32768


@dataclass(frozen=True)
class StackEntry:
    """One LoRA of a stack."""

    weights: LoraWeights
    strength: float


@dataclass(frozen=True)
class StackCost:
    """What a bound stack costs: memory, and matrix products in every step.

    Attributes:
        elements: numbers that lie on the device.
        linears: that have low-rank matrices.
        max_rank: the ranks of all LoRAs on one linear, summed, where that is most.
        summed_rank: the same over all linears: what the products of a step grow with.
    """

    elements: int
    linears: int
    max_rank: int
    summed_rank: int

    def step_share(self, parameters: int) -> float:
        """Arithmetic of a step with the stack, over that of the model's weights (attention aside) without it."""
        return self.elements / parameters

    def megabytes(self, dtype: torch.dtype) -> float:
        """Size on the device in MB (10**6 bytes)."""
        return self.elements * dtype.itemsize / 1e6


@dataclass(frozen=True)
class LoraStack:
    """An ordered, immutable stack of LoRAs. The empty stack is the base model.

    Attributes:
        entries: first applied first.
        max_rank: what the summed rank on each linear is cut to, see `truncate`; 0 leaves the stack exact.
    """

    entries: tuple[StackEntry, ...] = ()
    max_rank: int = 0

    def with_lora(self, weights: LoraWeights, strength: float) -> LoraStack:
        """A new stack with one more LoRA on top.

        Raises:
            LoraError: the strength is not a finite number.
        """
        if not math.isfinite(strength):
            raise LoraError(f"LoRA '{weights.name}': strength is {strength}, expected a finite number.")
        return replace(self, entries=(*self.entries, StackEntry(weights, float(strength))))

    def with_max_rank(self, max_rank: int) -> LoraStack:
        """The same stack, cut to a rank; 0 leaves it exact.

        Raises:
            LoraError: the rank is negative.
        """
        if max_rank < 0:
            raise LoraError(f"max_rank is {max_rank}, expected 0 (exact) or a rank such as 64.")
        return replace(self, max_rank=max_rank)

    @property
    def active(self) -> tuple[StackEntry, ...]:
        """The entries that change anything."""
        return tuple(entry for entry in self.entries if entry.strength != 0.0)

    @property
    def cost(self) -> StackCost:
        """What the stack takes when it is bound; see `StackCost`."""
        ranks: dict[str, int] = defaultdict(int)
        elements = 0
        shared: set[tuple[str, int]] = set()
        for number, entry in enumerate(self.active):
            for layer in entry.weights.layers:
                if isinstance(layer, RotationLayer):
                    elements += layer.turn.numel()
                    continue
                ranks[layer.module] += layer.rank
                elements += layer.lora_B.numel()
                if (number, id(layer.lora_A)) not in shared:
                    shared.add((number, id(layer.lora_A)))
                    elements += layer.lora_A.numel()
        return StackCost(elements, len(ranks), max(ranks.values(), default=0), sum(ranks.values()))

    @property
    def key(self) -> tuple[tuple[FileIdentity, float] | int, ...]:
        """What the bound tensors depend on: equal keys, equal output."""
        active = tuple((entry.weights.identity, entry.strength) for entry in self.active)
        return (*active, self.max_rank) if active and self.max_rank else active

    @property
    def needs_base(self) -> bool:
        """Whether preparing it takes the model's own weights: for DoRA, biases and norms."""
        return any(entry.weights.needs_base for entry in self.active)

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Which LoRAs change anything, in order."""
        return tuple(entry.weights.identity for entry in self.active)

    @property
    def strengths(self) -> tuple[float, ...]:
        """How much each of `identities` does."""
        return tuple(entry.strength for entry in self.active)

    def __str__(self) -> str:
        """The stack as a person would write it: `a.safetensors × 0.8 + b.safetensors × 1`."""
        return " + ".join(f"{entry.weights.name} × {entry.strength:g}" for entry in self.active) or "none"


@dataclass(frozen=True)
class Placed:
    """Where one linear's matrices lie in the flat buffer, in elements."""

    a_start: int
    a_shape: tuple[int, int]
    b_start: int
    b_shape: tuple[int, int]


@dataclass(frozen=True)
class FlatLora:
    """A stack, ready to bind: every low-rank matrix of it in one buffer.

    Attributes:
        buffer: (elements,) of the transformer's dtype, on the host or the device.
        placed: module -> its place. Linears of one fused layer share their lora_A.
        mixing: module -> (blocks, b, b) of the same dtype: a block-diagonal matrix that the base linear's output,
            without its bias, is multiplied with before the LoRA is added. b = 1 scales rows (DoRA).
        vectors: parameter -> (size,) of the same dtype: biases and norms that stand in the place of the base's.
    """

    buffer: Tensor
    placed: Mapping[str, Placed]
    mixing: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in (self.buffer, *self.mixing.values(), *self.vectors.values()))


Layers = list[tuple[LoraLayer | RotationLayer, float]]


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
            product serves them all, see `layers`.

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
        for module in ordered:
            layers = by_module[module]
            if is_plain(layers):
                composed[module] = layers
                continue
            result = _compose(module, layers, base)
            if result.mixing is not None:
                mixing[module] = _store(result.mixing, dtype, pin)
            low_rank = [layer for layer, _ in layers if isinstance(layer, LoraLayer)]
            if low_rank:
                # lora_A is what it was, so that the linears of a fused layer go on sharing it.
                columns = result.lora_B.split([layer.rank for layer in low_rank], dim=1)
                composed[module] = [
                    (LoraLayer(module, layer.lora_A, lora_B, 1.0), 1.0)
                    for layer, lora_B in zip(low_rank, columns, strict=True)
                ]
        buffer, placed = flat_buffer(composed, dtype, pin, buffers)
        vectors = {name: _store(value, dtype, pin) for name, value in _vectors(entries, base).items()}
        if not (
            ((not mixing and _fits(entries, dtype)) or all_finite(buffer))
            and all(all_finite(tensor) for tensor in (*mixing.values(), *vectors.values()))
        ):
            names = " + ".join(f"'{entry.weights.name}' × {entry.strength:g}" for entry in entries)
            raise LoraError(f"LoRA {names} overflows {dtype}: lower the strength, or choose another dtype.")
    return FlatLora(buffer, placed, mixing, vectors)


def flat_buffer(
    by_module: Mapping[str, Layers], dtype: torch.dtype, pin: bool, buffers: HostBuffers | None = None
) -> tuple[Tensor, dict[str, Placed]]:
    """Write low-rank layers, module by module, into one buffer; see `flatten`."""
    placed, elements, gaps = _place(by_module, dtype)
    if pin or buffers is None:
        buffer = torch.empty(elements, dtype=dtype, pin_memory=pin)
    else:
        buffer = buffers.take(elements * dtype.itemsize).view(dtype)
    with ThreadPoolExecutor(1) as thread:
        copied = thread.submit(_write_lora_A, buffer, gaps, placed, by_module)
        _write_lora_B(buffer, placed, by_module)
        copied.result()
    return buffer, placed


def _write_lora_A(
    buffer: Tensor, gaps: Sequence[tuple[int, int]], placed: Mapping[str, Placed], by_module: Mapping[str, Layers]
) -> None:
    """Write what is not scaled, on a thread of its own."""
    with torch.no_grad():
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
    runs: list[tuple[int, int, float]] = []  # first element, behind the last, factor
    for module, layers in by_module.items():
        place, (layer, strength) = placed[module], layers[0]
        if not _moved(buffer, place.b_start, place.b_shape, [layer.lora_B for layer, _ in layers]):
            _fill_scaled(buffer.as_strided(place.b_shape, (place.b_shape[1], 1), place.b_start), layers)
            continue
        end, factor = place.b_start + math.prod(place.b_shape), strength * layer.scale
        if runs and runs[-1][1:] == (place.b_start, factor):
            runs[-1] = (runs[-1][0], end, factor)
        else:
            runs.append((place.b_start, end, factor))
    for start, end, factor in runs:
        if factor != 1.0:
            buffer[start:end].mul_(factor)


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


def _compose(module: str, layers: Layers, base: BaseWeights | None) -> Composed:
    if base is None and any(isinstance(layer, LoraLayer) and layer.magnitude is not None for layer, _ in layers):
        raise ValueError(f"'{module}' has a DoRA, which needs the base weights.")
    first = layers[0][0]
    if isinstance(first, LoraLayer):
        shape = (first.lora_B.shape[0], first.lora_A.shape[1])
    else:
        low_rank = [layer for layer, _ in layers if isinstance(layer, LoraLayer)]
        shape = (first.turn.shape[0] * first.turn.shape[1], low_rank[0].lora_A.shape[1] if low_rank else 0)
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
        if entry.weights.peak * max([1.0, *(abs(entry.strength * scale) for scale in scales)]) > largest:
            return False
    return True


def aligned_rank(rank: int) -> int:
    """The rank that a matrix of this rank is stored with."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def _place(
    by_module: Mapping[str, Layers], dtype: torch.dtype
) -> tuple[dict[str, Placed], int, list[tuple[int, int]]]:
    """Where the matrices lie, the buffer's elements, and the elements between matrices."""
    step = BYTES_ALIGNMENT // dtype.itemsize
    placed: dict[str, Placed] = {}
    shared: dict[tuple[int, ...], int] = {}
    end = HEAD_BYTES // dtype.itemsize
    gaps = [(0, end)]

    def take(elements: int) -> int:
        nonlocal end
        start, end = end, end + -(-elements // step) * step
        if start + elements < end:
            gaps.append((start + elements, end))
        return start

    for module, layers in by_module.items():
        rank = aligned_rank(sum(layer.rank for layer, _ in layers))
        first = layers[0][0]
        # q, k and v of a fused file have the same lora_A: stored once, copied once, read from the cache.
        same = tuple(id(layer.lora_A) for layer, _ in layers)
        a_shape = (rank, first.lora_A.shape[1])
        if same not in shared:
            shared[same] = take(math.prod(a_shape))
        placed[module] = Placed(shared[same], a_shape, 0, (first.lora_B.shape[0], rank))
    # Every lora_B behind every lora_A: another strength is one product over one stretch of memory, see rescale.py.
    for module, place in placed.items():
        placed[module] = replace(place, b_start=take(math.prod(place.b_shape)))
    return placed, end, gaps


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
        lora_B = layer.lora_B
        if lora_B.dtype not in (target.dtype, torch.float32):
            lora_B = lora_B.float()
        for part, values in _serial(target.narrow(1, start, layer.rank), lora_B):
            torch.mul(values, strength * layer.scale, out=part)
        start += layer.rank
    if start < target.shape[1]:
        target[:, start:].zero_()


def _serial(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both, in parts that torch works on with the calling thread alone.

    A thousand small operations that wait for other threads each take five times as long on a machine that is busy.
    """
    rows = max(1, (SERIAL_ELEMENTS - 1) // max(1, target.shape[1]))
    if rows >= len(target):
        yield target, source
    else:
        yield from zip(target.split(rows), source.split(rows), strict=True)
