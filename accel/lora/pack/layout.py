"""Where the matrices of a stack lie in its flat buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...linear.kronecker import Term
from ...memory.buffers import BYTES_ALIGNMENT
from ..kinds.composed import KroneckerTerm
from ..kinds.layers import LoraLayer

# GEMMs on a GPU want sizes in multiples of 16 bytes; 16 columns serve every dtype down to float8.
RANK_ALIGNMENT = 16
# What every buffer begins with, zeros: a stack of biases alone has no matrix, and not every memory gives 0 bytes.
HEAD_BYTES = BYTES_ALIGNMENT

# The low-rank layers of one linear, each at its strength, in the order of its columns.
LowRanks = Sequence[tuple[LoraLayer, float]]


@dataclass(frozen=True)
class Placed:
    """Where one linear's matrices lie in the flat buffer.

    Attributes:
        a_start: first element of lora_A.
        a_shape: (rank, in_features).
        b_start: first element of lora_B.
        b_shape: (out_features, rank).
    """

    a_start: int
    a_shape: tuple[int, int]
    b_start: int
    b_shape: tuple[int, int]


class BufferLayout:
    """Hands out aligned places in a buffer that is yet to be made, one behind the other.

    Attributes:
        end: elements that the buffer must have so far.
        gaps: (first, behind the last) of elements that belong to nothing.
    """

    def __init__(self, dtype: torch.dtype, start: int | None = None) -> None:
        """Begin at an element, by default behind the buffer's head."""
        self._step = BYTES_ALIGNMENT // dtype.itemsize
        self.end = HEAD_BYTES // dtype.itemsize if start is None else start
        self.gaps = [(0, self.end)]

    def reserve(self, elements: int) -> int:
        """The first element of a new place."""
        start, self.end = self.end, self.end + -(-elements // self._step) * self._step
        if start + elements < self.end:
            self.gaps.append((start + elements, self.end))
        return start


def aligned_rank(rank: int) -> int:
    """The rank that a matrix of this rank is stored with."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def place_low_rank(
    by_module: Mapping[str, LowRanks], dtype: torch.dtype, layout: BufferLayout
) -> dict[str, Placed]:
    """Reserve every lora_A, then every lora_B.

    So another strength is one product over all lora_B, see `pack.strength`.
    """
    a_places: dict[str, tuple[int, tuple[int, int]]] = {}
    shared: dict[tuple[tuple[int, float], ...], int] = {}
    for module, layers in by_module.items():
        rank = aligned_rank(sum(layer.rank for layer, _ in layers))
        first = layers[0][0]
        # q, k and v of a fused file have the same lora_A: stored once, copied once, read from the cache.
        same = tuple((id(layer.lora_A), layer.factors(dtype)[0]) for layer, _ in layers)
        a_shape = (rank, first.lora_A.shape[1])
        if same not in shared:
            shared[same] = layout.reserve(math.prod(a_shape))
        a_places[module] = shared[same], a_shape
    placed: dict[str, Placed] = {}
    for module, (a_start, a_shape) in a_places.items():
        b_shape = by_module[module][0][0].rows, a_shape[0]
        placed[module] = Placed(a_start, a_shape, layout.reserve(math.prod(b_shape)), b_shape)
    return placed


def place_kroneckers(
    terms: Mapping[str, Sequence[KroneckerTerm]], layout: BufferLayout
) -> dict[str, tuple[Term, ...]]:
    """Reserve right matrices and mixings, then every left matrix: so another strength is one product over these."""
    rights: dict[int, int] = {}
    mixings: list[int] = []
    for term in (term for of_module in terms.values() for term in of_module):
        if id(term.right) not in rights:
            rights[id(term.right)] = layout.reserve(term.right.numel())
        mixings.append(0 if term.mixing is None else layout.reserve(term.mixing.numel()))
    mixing = iter(mixings)
    placed: dict[str, tuple[Term, ...]] = {}
    for module, of_module in terms.items():
        found = []
        for term in of_module:
            width = 0 if term.mixing is None else term.mixing.shape[1]
            sides = (layout.reserve(term.left.numel()), *term.left.shape, rights[id(term.right)], *term.right.shape)
            found.append(Term(*sides, term.first, next(mixing), width))
        placed[module] = tuple(found)
    return placed
