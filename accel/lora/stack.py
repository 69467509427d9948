"""Stacks of LoRAs, and the one flat buffer that a stack becomes before it is bound.

Stacks are exact: the ranks of all LoRAs on a linear are concatenated, A = [A₁; A₂; …], B = [s₁ B₁, s₂ B₂, …], with
strength · alpha / rank folded into B in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import FileIdentity
from ..tensors import all_finite
from .weights import LoraLayer, LoraWeights

# GEMMs on a GPU want sizes in multiples of 16 bytes; 16 columns serve every dtype down to float8.
RANK_ALIGNMENT = 16
# Compiled kernels assume the alignment of the pointers that they saw first.
BYTES_ALIGNMENT = 64
# No matrix starts at the very beginning of a buffer: dynamo makes a storage offset of 0 a constant and every other one
# a symbol, so a matrix at offset 0 would recompile what a matrix elsewhere compiled.
HEAD_BYTES = BYTES_ALIGNMENT


@dataclass(frozen=True)
class StackEntry:
    """One LoRA of a stack."""

    weights: LoraWeights
    strength: float


@dataclass(frozen=True)
class LoraStack:
    """An ordered, immutable stack of LoRAs. The empty stack is the base model."""

    entries: tuple[StackEntry, ...] = ()

    def with_lora(self, weights: LoraWeights, strength: float) -> LoraStack:
        """A new stack with one more LoRA on top.

        Raises:
            LoraError: the strength is not a finite number.
        """
        if not math.isfinite(strength):
            raise LoraError(f"LoRA '{weights.name}': strength is {strength}, expected a finite number.")
        return LoraStack((*self.entries, StackEntry(weights, float(strength))))

    @property
    def active(self) -> tuple[StackEntry, ...]:
        """The entries that change anything."""
        return tuple(entry for entry in self.entries if entry.strength != 0.0)

    @property
    def key(self) -> tuple[tuple[FileIdentity, float], ...]:
        """What the bound tensors depend on: equal keys, equal output."""
        return tuple((entry.weights.identity, entry.strength) for entry in self.active)

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
    """A stack, ready to bind: every matrix of it in one buffer.

    Attributes:
        buffer: (elements,) of the transformer's dtype, on the host or the device.
        placed: module -> its place. Linears of one fused layer share their lora_A.
    """

    buffer: Tensor
    placed: Mapping[str, Placed]

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()


def flatten(entries: Sequence[StackEntry], dtype: torch.dtype, pin: bool) -> FlatLora:
    """Concatenate, scale and cast a stack into one flat host buffer.

    Args:
        entries: at least one; strengths are not 0.
        dtype: the transformer's dtype.
        pin: whether to use page-locked memory, from which a copy to a CUDA device is asynchronous and twice as fast.

    Returns:
        The buffer on the CPU; ranks are rounded up to `RANK_ALIGNMENT` with zeros.

    Raises:
        LoraError: a strength makes a matrix overflow the dtype.
    """
    with torch.inference_mode(False), torch.no_grad():
        by_module: dict[str, list[tuple[LoraLayer, float]]] = defaultdict(list)
        for entry in entries:
            for layer in entry.weights.layers:
                by_module[layer.module].append((layer, entry.strength))
        placed, elements = _place(by_module, dtype)
        buffer = torch.zeros(elements, dtype=dtype, pin_memory=pin)
        filled = set()
        for module, layers in by_module.items():
            place = placed[module]
            if place.a_start not in filled:
                filled.add(place.a_start)
                lora_A = buffer[place.a_start :][: math.prod(place.a_shape)].view(place.a_shape)
                _fill(lora_A, layers)
            lora_B = buffer[place.b_start :][: math.prod(place.b_shape)].view(place.b_shape)
            _fill_scaled(lora_B, layers)
        if not all_finite(buffer):
            names = " + ".join(f"'{entry.weights.name}' × {entry.strength:g}" for entry in entries)
            raise LoraError(f"LoRA {names} overflows {dtype}: lower the strength, or choose another dtype.")
    return FlatLora(buffer, placed)


def aligned_rank(rank: int) -> int:
    """The rank that a matrix of this rank is stored with."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def _place(
    by_module: Mapping[str, list[tuple[LoraLayer, float]]], dtype: torch.dtype
) -> tuple[dict[str, Placed], int]:
    step = BYTES_ALIGNMENT // dtype.itemsize
    placed: dict[str, Placed] = {}
    shared: dict[tuple[int, ...], int] = {}
    end = HEAD_BYTES // dtype.itemsize

    def take(elements: int) -> int:
        nonlocal end
        start, end = end, end + -(-elements // step) * step
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
    return placed, end


def _fill(target: Tensor, layers: Sequence[tuple[LoraLayer, float]]) -> None:
    start = 0
    for layer, _ in layers:
        target[start : start + layer.rank].copy_(layer.lora_A)
        start += layer.rank


def _fill_scaled(target: Tensor, layers: Sequence[tuple[LoraLayer, float]]) -> None:
    """Write strength · scale · B, rounded once, without a temporary where the kernel computes in float32 by itself."""
    start = 0
    for layer, strength in layers:
        lora_B = layer.lora_B
        if lora_B.dtype not in (target.dtype, torch.float32):
            lora_B = lora_B.float()
        torch.mul(lora_B, strength * layer.scale, out=target.narrow(1, start, layer.rank))
        start += layer.rank
