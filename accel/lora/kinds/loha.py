"""LoHa: scaling · (w1_a @ w1_b) * (w2_a @ w2_b), the elementwise product of two low-rank matrices.

Its rank is the product of both ranks, at which two thin matrices say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ...tensors import to_float
from . import lowrank
from .base import ALPHA, Change, ComfyAdapter, ProductKind
from .lowrank import Factors, Tolerance
from .shapes import Shapes

SIDES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
MIDDLES = ("hada_t1", "hada_t2")


class Loha(ProductKind):
    """A Hadamard product."""

    name: ClassVar[str] = "LoHa"
    endings: ClassVar[Mapping[str, str]] = {f".{role}": role for role in (*SIDES, *MIDDLES)}
    companions: ClassVar[tuple[str, ...]] = (ALPHA, "dora_scale")
    comfyui: ClassVar[ComfyAdapter] = ComfyAdapter(
        "LoHaAdapter", ("hada_w1_a", "hada_w1_b", ALPHA, "hada_w2_a", "hada_w2_b", *MIDDLES, "dora_scale")
    )

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        target, ranks = shapes.target, []
        for role in SIDES:
            shapes.need(role, role)
        if any(role in shapes for role in MIDDLES):
            for role in MIDDLES:
                shapes.need(role, role)
        for number in "12":
            left, right, middle = f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}"
            rank, columns = shapes.matrix(right)
            expected = (rank, target.out_features) if middle in shapes else (target.out_features, rank)
            shapes.expect(right, columns == target.in_features, f"(rank, {target.in_features})")
            shapes.expect(left, shapes.matrix(left) == expected, str(expected))
            if middle in shapes:
                shapes.expect(middle, shapes.matrix(middle) == (rank, rank), f"({rank}, {rank}, 1, 1)")
            ranks.append(rank)
        return ranks[0] * ranks[1]

    def alpha_rank(self, change: Change) -> int:
        """The rank of the first product."""
        return change.headers["hada_w1_b"].shape[0]

    def factors(self, change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance) -> Factors:
        """See `ProductKind`."""
        left1, right1, left2, right2 = _sides(tensors)
        if change.rank > tolerance.max_rank:  # as large as the weight, but smaller than its factors
            return lowrank.sketch((left1 @ right1) * (left2 @ right2), tolerance.error, tolerance.max_rank)
        factors = lowrank.hadamard(left1, right1, left2, right2)
        if change.approximated(tolerance):
            return lowrank.compress(factors, tolerance.error, tolerance.max_rank)
        return factors


def _sides(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The two products, float32: (out_features, r1), (r1, in_features), (out_features, r2), (r2, in_features)."""
    sides = [to_float(tensors[role]).flatten(1) for role in SIDES]
    if "hada_t1" not in tensors:
        return sides
    middles = [to_float(tensors[role]).flatten(1) for role in MIDDLES]
    return [sides[0].T, middles[0] @ sides[1], sides[2].T, middles[1] @ sides[3]]
