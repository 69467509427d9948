"""A difference of a whole weight: `.diff`, added at the strength. Of a low rank, or cut to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ...tensors import to_float
from . import lowrank
from .base import Change, ProductKind
from .lowrank import Factors, Tolerance
from .shapes import Shapes


class Difference(ProductKind):
    """A matrix as large as the weight."""

    name: ClassVar[str] = "difference"
    endings: ClassVar[Mapping[str, str]] = {".diff": "diff"}

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        expected = shapes.target.out_features, shapes.target.in_features
        shapes.expect("diff", shapes.matrix("diff") == expected, str(expected))
        return min(expected)

    def factors(self, change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance) -> Factors:
        """See `ProductKind`."""
        matrix = to_float(tensors["diff"]).flatten(1)
        if change.approximated(tolerance):
            return lowrank.sketch(matrix, tolerance.error, tolerance.max_rank)
        return lowrank.whole(matrix)
