"""A difference of a bias: `.diff_b`, added at the strength. It may come alone or with any other kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget
from ...tensors import own_vector
from .base import Change, Converted, Kind, Values
from .layers import VectorLayer, split_bias
from .shapes import INSTEAD, Shapes


class Bias(Kind):
    """Numbers that are added to a bias."""

    name: ClassVar[str] = "bias"
    endings: ClassVar[Mapping[str, str]] = {".diff_b": "diff_b"}
    bias_roles: ClassVar[tuple[str, ...]] = ("diff_b",)
    changes_weight: ClassVar[bool] = False

    def check(self, shapes: Shapes) -> int:
        """See `Kind`."""
        if "diff_b" in shapes:
            shapes.vector("diff_b", shapes.target.out_features)
        return 0

    def convert(self, change: Change, values: Values) -> Converted:
        """See `Kind`: alone it becomes nothing else than beside another kind."""
        return Converted()

    def beside(self, target: LoraTarget, tensors: Mapping[str, Tensor]) -> tuple[VectorLayer, ...]:
        """What it becomes, with whatever kind it comes; nothing where it is not there."""
        if "diff_b" not in tensors:
            return ()
        return split_bias(target, own_vector(tensors["diff_b"]), 1.0)


def require_bias(shapes: Shapes, roles: Collection[str]) -> None:
    """Refuse what changes a bias where the linears have none.

    Args:
        shapes: of a change of any kind.
        roles: of all tensors that change a bias.

    Raises:
        LoraError: there is one.
    """
    for role, header in shapes.headers.items():
        if role in roles and not shapes.target.bias:
            raise LoraError(
                f"{shapes.source}: '{header.key}' changes a bias of '{shapes.name}', which has none in this model. "
                f"{INSTEAD}"
            )
