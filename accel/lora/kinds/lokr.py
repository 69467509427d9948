"""LoKr: scaling · kron(w1, w2), each of which is one matrix or a product of two; alpha counts only beside a product.

Never formed and never cut: it is carried as w1 and w2, or as a LoRA where its rank is so low that this is less work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ...families.layout import LoraTarget
from ...linear.kronecker import multiplications
from ...tensors import to_float
from . import lowrank
from .base import ALPHA, Change, ComfyAdapter, Converted, Kind, Values
from .layers import KroneckerLayer, split_low_rank
from .lowrank import Factors
from .shapes import Shapes, TensorHeader

FACTORS = ("lokr_w1", "lokr_w2")
ROLES = (*(f"{factor}{end}" for factor in FACTORS for end in ("", "_a", "_b")), "lokr_t2")


class Lokr(Kind):
    """A Kronecker product."""

    name: ClassVar[str] = "LoKr"
    endings: ClassVar[Mapping[str, str]] = {f".{role}": role for role in ROLES}
    companions: ClassVar[tuple[str, ...]] = (ALPHA, "dora_scale")
    comfyui: ClassVar[ComfyAdapter] = ComfyAdapter(
        "LoKrAdapter",
        (*FACTORS, ALPHA, "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
    )

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        target = shapes.target
        if "lokr_t2" in shapes and ("lokr_w2" in shapes or "lokr_w2_b" not in shapes):
            shapes.expect("lokr_t2", False, "no middle matrix beside a whole lokr_w2")
        (rows1, columns1, rank1), (rows2, columns2, rank2) = (_check_factor(shapes, factor) for factor in FACTORS)
        role = "lokr_w1" if "lokr_w1" in shapes else "lokr_w1_a"
        shapes.expect(
            role,
            rows1 * rows2 == target.out_features and columns1 * columns2 == target.in_features,
            f"a factor of ({target.out_features}, {target.in_features}) beside one of ({rows2}, {columns2})",
        )
        return rank1 * rank2

    def alpha_rank(self, change: Change) -> int:
        """Of the last factor that is a product; with none, ComfyUI and LyCORIS ignore alpha."""
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in change.headers:
                return change.headers[role].shape[0]
        return 0

    def ignores_alpha(self, headers: Mapping[str, TensorHeader]) -> bool:
        """Beside whole matrices, where ai-toolkit writes more than float16 holds."""
        return headers.keys() >= set(FACTORS)

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`."""
        target = change.target
        sides = [_side(values.tensors, factor) for factor in FACTORS]
        left, right = (side if isinstance(side, Tensor) else side.lora_B @ side.lora_A for side in sides)
        low_rank = change.rank * (target.in_features + target.out_features)
        if change.rank <= values.tolerance.exact_rank and low_rank <= multiplications(left.shape, right.shape):
            factors = lowrank.kronecker(*(lowrank.whole(to_float(s)) if isinstance(s, Tensor) else s for s in sides))
            return Converted(split_low_rank(target, factors.lora_A, factors.lora_B, values.scaling))
        return Converted(_split(target, left, right, values.scaling))


def _check_factor(shapes: Shapes, factor: str) -> tuple[int, int, int]:
    """Rows, columns and rank of one factor."""
    left, right = f"{factor}_a", f"{factor}_b"
    if factor in shapes:
        for half in (left, right):
            if half in shapes:
                shapes.expect(half, False, f"no such matrix beside {factor}")
        rows, columns = shapes.matrix(factor)
        return rows, columns, min(rows, columns)
    shapes.need(left, factor)
    shapes.need(right, right)
    rank, columns = shapes.matrix(right)
    tucker = factor == "lokr_w2" and "lokr_t2" in shapes
    shape = shapes.matrix(left)
    rows, other = (shape[1], shape[0]) if tucker else shape
    shapes.expect(left, other == rank, f"(rows, {rank})")
    if tucker:
        shapes.expect("lokr_t2", shapes.matrix("lokr_t2") == (rank, rank), f"({rank}, {rank}, 1, 1)")
    return rows, columns, rank


def _side(tensors: Mapping[str, Tensor], factor: str) -> Tensor | Factors:
    """One factor: a matrix in the file's dtype, or the two that it is the product of."""
    if factor in tensors:
        return tensors[factor].flatten(1)
    left, right = (to_float(tensors[f"{factor}_{half}"].flatten(1)) for half in "ab")
    if factor == "lokr_w2" and "lokr_t2" in tensors:
        left, right = left.T.contiguous(), to_float(tensors["lokr_t2"]).flatten(1) @ right
    return Factors(right, left)


def _split(target: LoraTarget, left: Tensor, right: Tensor, scale: float) -> tuple[KroneckerLayer, ...]:
    """Give each linear of a target its rows of a Kronecker product, which may begin and end inside a block of right's.

    Args:
        target: has a · m rows and b · n columns.
        left: (a, b).
        right: (m, n).
        scale: of the product.
    """
    size, shift = len(right), target.out_features // 2 if target.swap_halves else 0
    layers = []
    for part in target.parts:
        first = (part.start + shift) % target.out_features
        end = first + part.rows
        # Blocks of `size` rows that the part touches; all where it goes on at the beginning.
        begin = first // size if end <= target.out_features else 0
        blocks = left[begin : -(-end // size)] if end <= target.out_features else left
        layers.append(KroneckerLayer(part.module, blocks, right, scale, part.rows, first - begin * size))
    return tuple(layers)
