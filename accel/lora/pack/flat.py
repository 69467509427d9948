"""The one flat buffer that a stack of LoRAs becomes before it is bound.

Stacks are exact: the ranks of all LoRAs on a linear are concatenated, A = [A₁; A₂; …], B = [s₁ B₁, s₂ B₂, …], with
strength · alpha / rank folded into B in float32 (in float16 partly into A, see `LoraLayer.factors`). Kronecker products
stay side by side, with it folded into the left matrix. What does not only add to a weight is composed, see
`kinds.composed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...linear.kronecker import Term
from ...memory.buffers import HostBuffers
from ...memory.garbage import collected_later
from ...tensors import all_finite, to_float
from ..kinds.composed import BaseWeights, KroneckerTerm
from ..kinds.layers import VectorLayer
from ..stack import StackEntry, overflow
from .compose import parts_by_module
from .layout import BufferLayout, LowRanks, Placed, place_kroneckers, place_low_rank
from .write import Scaled, Writer


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
        pin: whether to use page-locked memory, from which a copy to a CUDA device is asynchronous.
        base: the model's weights, for changes that depend on them, and of biases and norms.
        buffers: where memory comes from that is not page-locked; None takes it from the system, which is slower.
        order: modules in the order in which they run; others come behind them. lora_A of linears that read the same
            input then adjoin, and one product serves them all, see `linear.operators`.
        background: see `write.Writer`.

    Returns:
        The buffer on the CPU; ranks are rounded up to `RANK_ALIGNMENT` with zeros.

    Raises:
        LoraError: a strength makes a matrix overflow the dtype, or see `kinds.layers.Layer.apply`.
        ValueError: an entry needs `base`, and there is none.
    """
    with torch.inference_mode(False), torch.no_grad(), collected_later():
        parts = parts_by_module(entries, base, order)
        low_rank = {module: part.low_rank for module, part in parts.items() if part.low_rank}
        terms = {module: part.kroneckers for module, part in parts.items() if part.kroneckers}
        mixing = {
            module: _store(part.mixing, dtype, pin) for module, part in parts.items() if part.mixing is not None
        }
        layout = BufferLayout(dtype)
        kroneckers = place_kroneckers(terms, layout)
        buffer, placed = flat_buffer(low_rank, dtype, pin, buffers, layout, background=background)
        _write_kroneckers(Writer(buffer, background=background), kroneckers, terms)
        vectors = {name: _store(value, dtype, pin) for name, value in _vectors(entries, base).items()}
        flat = FlatLora(buffer, placed, mixing, vectors, kroneckers)
        if not _is_finite(flat, entries):
            raise overflow(entries, dtype)
    return flat


def flat_buffer(
    by_module: Mapping[str, LowRanks],
    dtype: torch.dtype,
    pin: bool,
    buffers: HostBuffers | None,
    layout: BufferLayout,
    *,
    background: bool = False,
) -> tuple[Tensor, dict[str, Placed]]:
    """Write low-rank layers, module by module, into one buffer, behind what is reserved already.

    Args:
        by_module: the layers of each linear.
        dtype: see `flatten`; so are `pin`, `buffers` and `background`.
        pin: whether the buffer is page-locked.
        buffers: where it comes from otherwise.
        layout: where there is room; its gaps are filled with zeros, and what it had reserved before stays unwritten.
        background: see `write.Writer`.

    Returns:
        The buffer, (layout.end,) of dtype on the CPU; and module -> place.
    """
    placed = place_low_rank(by_module, dtype, layout)
    if pin or buffers is None:
        buffer = torch.empty(layout.end, dtype=dtype, pin_memory=pin)
    else:
        buffer = buffers.take(layout.end * dtype.itemsize).view(dtype)
    for start, end in layout.gaps:
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


def _write_kroneckers(
    writer: Writer, placed: Mapping[str, Sequence[Term]], terms: Mapping[str, Sequence[KroneckerTerm]]
) -> None:
    """Write factor · left, rounded once, and the others as they are."""
    filled = set()
    for module, places in placed.items():
        for place, term in zip(places, terms[module], strict=True):
            writer.write(place.left, term.left.shape, [Scaled(term.left, term.factor)])
            if place.right not in filled:
                filled.add(place.right)
                writer.write(place.right, term.right.shape, [Scaled(term.right, 1.0)])
            if term.mixing is not None:
                place.blocks(writer.buffer, term.rows).copy_(term.mixing.flatten())
    writer.finish()


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


def _is_finite(flat: FlatLora, entries: Sequence[StackEntry]) -> bool:
    """Whether no number of a stack overflowed its dtype."""
    surely = not flat.mixing and _fits(entries, flat.buffer.dtype)
    return (surely or all_finite(flat.buffer)) and all(map(all_finite, (*flat.mixing.values(), *flat.vectors.values())))


def _fits(entries: Sequence[StackEntry], dtype: torch.dtype) -> bool:
    """Whether no element can overflow, from what is known without looking at it."""
    largest = torch.finfo(dtype).max
    for entry in entries:
        low_ranks = (layer.low_rank for layer in entry.adapter.layers)
        scales = {layer.factors(dtype)[1] for layer in low_ranks if layer is not None}
        bounds = [entry.adapter.peak * factor for factor in (1.0, *(abs(entry.strength * scale) for scale in scales))]
        if not all(bound <= largest for bound in bounds):  # nor where one is NaN
            return False
    return True
