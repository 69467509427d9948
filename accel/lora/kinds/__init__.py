"""The kinds of change that trainers write for one linear: one module for each, and the one table of them.

The arithmetic is that of comfy/weight_adapter (ComfyUI 0.30), which is what a LoRA looks like everywhere else:

    LoRA       s · alpha / rank · B @ A, with a 1x1 middle matrix (LoCon) B @ mid @ A
    LoHa       s · alpha / rank · (w1_a @ w1_b) * (w2_a @ w2_b)
    LoKr       s · alpha / rank · kron(w1, w2); alpha counts only if w1 or w2 is a product
    GLoRA      s · alpha / rank · (weight @ a1 @ a2 + b1 @ b2); in older files a1 and a2, b1 and b2 are exchanged
    difference s · diff, as large as the weight: of a low rank, or cut to one
    OFT        s² · (R - I)ᵀ @ weight, R the Cayley transform of skew blocks; the square is ComfyUI's, see `oft`
    bias       s · diff_b on the bias, alone or with any other kind
    DoRA       (1 - s) · weight + s · m / ‖rows of weight‖ · (weight + change), over LoRA, LoHa or LoKr
    PEFT DoRA  m / ‖rows of weight + s · change‖ · (weight + s · change), over LoRA: peft/tuners/lora/dora.py

To add a kind, add a module with a `base.Kind` and, unless LoRA's or LoKr's layers will do, a `layers.Layer`; then one
line to `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...families.layout import LoraTarget
from . import dora
from .base import ALPHA, Change, Converted, Values
from .bias import Bias, require_bias
from .difference import Difference
from .glora import Glora
from .loha import Loha
from .lokr import Lokr
from .lora import Lora
from .lowrank import Factors, Tolerance
from .oft import Oft
from .refused import refuse
from .shapes import Shapes, TensorHeader
from .table import KindTable

KINDS = KindTable(
    Lora(),
    Loha(),
    Lokr(),
    Glora(),
    Oft(),
    Difference(),
    bias=Bias(),
)


def role_of(ending: str) -> str | None:
    """What the tensor is of which a key ends so; None: no kind's."""
    return KINDS.role_of(ending)


def check_change(source: str, name: str, target: LoraTarget, headers: Mapping[str, TensorHeader]) -> Change:
    """Recognise the kind of a change and check every shape; reads no values.

    Args:
        source: what messages begin with, such as `LoRA 'x.safetensors'`.
        name: the layer as the source calls it.
        target: the linears that it means.
        headers: role -> tensor.

    Raises:
        LoraError: a kind that cannot be carried, two kinds at once, a missing tensor, a wrong shape, or a bias that the
            linears do not have.
    """
    refuse(source, headers)
    kind = KINDS.recognise(source, name, headers)
    shapes = Shapes(source, name, target, headers)
    require_bias(shapes, KINDS.bias_roles)
    rank = kind.check(shapes)
    KINDS.bias.check(shapes)
    if ALPHA in shapes:
        shapes.expect(ALPHA, shapes.numel(ALPHA) == 1, "one number")
    dora.check(shapes)
    return Change(source, name, target, kind, headers, rank)


def convert(
    change: Change,
    tensors: Mapping[str, Tensor],
    scale: float | None,
    factors: Factors | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Converted:
    """Turn the values of a change into layers.

    Args:
        change: checked by `check_change`.
        tensors: role -> values, finite; the ones that `factors` stands for may be missing.
        scale: in place of alpha / rank; from the metadata of PEFT's files.
        factors: of a product, see `base.product_factors`.
        tolerance: up to which rank a LoKr may become a LoRA.

    Raises:
        LoraError: values that cannot be carried, such as an OFT whose blocks lie across two linears.
    """
    scaling = change.scaling(tensors) if scale is None else scale
    own = change.kind.convert(change, Values(tensors, scaling, tolerance, factors))
    layers = dora.over(own.layers, change.target, tensors)
    return Converted(layers, (*KINDS.bias.beside(change.target, tensors), *own.vectors))
