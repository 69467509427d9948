"""The kinds of change that trainers write for one linear, their shapes, and what each becomes.

The arithmetic is that of comfy/weight_adapter (ComfyUI 0.30), which is what a LoRA looks like everywhere else:

    LoRA       s · alpha / rank · B @ A, with a 1x1 middle matrix (LoCon) B @ mid @ A
    LoHa       s · alpha / rank · (w1_a @ w1_b) * (w2_a @ w2_b)
    LoKr       s · alpha / rank · kron(w1, w2); alpha counts only if w1 or w2 is a product. Never formed, never cut: it
               is carried as w1 and w2, or as a LoRA where its rank is so low that this is less work
    GLoRA      s · alpha / rank · (weight @ a1 @ a2 + b1 @ b2); in older files a1 and a2, b1 and b2 are exchanged
    difference s · diff, as large as the weight: of a low rank, or cut to one
    OFT        s² · (R - I)ᵀ @ weight, R the Cayley transform of skew blocks; s² is ComfyUI's, which multiplies twice
    DoRA       (1 - s) · weight + s · m / ‖rows of weight‖ · (weight + change), over any kind but OFT
    PEFT DoRA  m / ‖rows of weight + s · change‖ · (weight + s · change): peft/tuners/lora/dora.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import LoraError
from ...families.layout import LoraTarget
from ...linear.kronecker import multiplications
from ..adapter import (
    InputLayer,
    KroneckerLayer,
    Layer,
    LoraLayer,
    Magnitude,
    VectorLayer,
    own_vector,
    split,
    split_bias,
    split_kronecker,
    split_rotation,
    to_float,
)
from . import lowrank
from .lowrank import Factors, Tolerance
from .shapes import CHECKS, INSTEAD, LOHA, Piece, Shapes, check_companions, glora_roles

# Kind -> the roles that make it, and those that may come with it. A factor of LoKr is one matrix or a product of two.
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("A", "B", "mid", "alpha", "dora_scale", "magnitude", "up_bias"),
    "LoHa": (*LOHA, "hada_t1", "hada_t2", "alpha", "dora_scale"),
    "LoKr": (*_LOKR, "lokr_t2", "alpha", "dora_scale"),
    "GLoRA": ("a1", "a2", "b1", "b2", "alpha"),
    "OFT": ("oft_blocks", "rescale", "alpha"),
    "difference": ("diff",),
    "bias": (),
}
UNREAD = "ComfyUI does not read it either: choose a LoRA of another kind."
# Roles that cannot be carried beside the weights -> why, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "set_weight": ("a whole weight, which is as large as the model", INSTEAD),
    "reshape_weight": (
        "a reshaped weight, as BFL's control LoRAs have: the model's input has another width then", INSTEAD),
    "oft_R": ("PEFT's or OneTrainer's OFT, which rotates the layer's input", UNREAD),
    "ia3": ("IA3", UNREAD),
    "w_norm": ("a norm's difference on a linear layer", INSTEAD),
    "b_norm": ("a norm's bias, which FLUX.1 does not have", INSTEAD),
    "weight": ("a whole weight, as in a checkpoint or in a control LoRA of ai-toolkit", UNREAD),
}


@dataclass(frozen=True)
class Change:
    """A change of one linear whose shapes are right.

    Attributes:
        source: what messages begin with, such as `LoRA 'x.safetensors'`.
        name: the module as the source calls it.
        target: the linears that it means.
        kind: a key of `COMPANIONS`.
        pieces: role -> tensor.
        rank: at which it is exact; 0 for OFT and biases.
    """

    source: str
    name: str
    target: LoraTarget
    kind: str
    pieces: Mapping[str, Piece]
    rank: int

    @property
    def label(self) -> str:
        """The kind as a person knows it."""
        return f"DoRA ({self.kind})" if {"dora_scale", "magnitude"} & self.pieces.keys() else self.kind

    @property
    def ignored(self) -> frozenset[str]:
        """Keys without a meaning: alpha beside whole matrices, where ai-toolkit writes more than float16 holds."""
        if "alpha" in self.pieces and self.kind == "LoKr" and {"lokr_w1", "lokr_w2"} <= self.pieces.keys():
            return frozenset((self.pieces["alpha"].key,))
        return frozenset()

    @property
    def is_product(self) -> bool:
        """Whether `product_factors` makes its low-rank matrices."""
        return self.kind in ("LoHa", "difference")

    def approximated(self, tolerance: Tolerance) -> bool:
        """Whether it may be cut to a lower rank."""
        return self.is_product and self.rank > tolerance.exact_rank


@dataclass(frozen=True)
class Converted:
    """What a change becomes.

    Attributes:
        layers: changes of linears.
        vectors: changes of biases.
    """

    layers: tuple[Layer, ...]
    vectors: tuple[VectorLayer, ...]


def check_change(source: str, name: str, target: LoraTarget, pieces: Mapping[str, Piece]) -> Change:
    """Recognise the kind of a change and check every shape; reads no values.

    Raises:
        LoraError: a kind that cannot be carried, two kinds at once, a missing tensor or a wrong shape.
    """
    for role, (reason, advice) in REFUSED.items():
        if role in pieces:
            raise LoraError(f"{source}: '{pieces[role].key}' is {reason}. {advice}")
    kind = _kind(source, name, pieces)
    for role, piece in pieces.items():
        if role not in COMPANIONS[kind] and role != "diff_b":
            raise LoraError(f"{source}: '{piece.key}' does not belong with the {kind} on '{name}'. {INSTEAD}")
    shapes = Shapes(source, name, target, pieces)
    rank = CHECKS[kind](shapes)
    check_companions(shapes)
    return Change(source, name, target, kind, pieces, rank)


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
        scale: of the low-rank product, in place of alpha / rank; from the metadata of PEFT's files.
        factors: of a product, see `product_factors`.
        tolerance: up to which rank a LoKr may become a LoRA.

    Raises:
        LoraError: a DoRA, OFT or bias whose values cannot be carried.
    """
    vectors: list[VectorLayer] = []
    layers: list[Layer] = []
    if "diff_b" in tensors:
        vectors += split_bias(change.target, own_vector(tensors["diff_b"]), 1.0)
    if change.kind == "OFT":
        layers += split_rotation(f"{change.source}: '{change.name}'", change.target, _turn(change, tensors))
    elif change.kind == "LoKr":
        layers += _split_lokr(change, tensors, tolerance)
    elif change.kind == "GLoRA":
        layers += _split_glora(change, tensors)
    elif change.kind != "bias":
        if factors is not None:
            lora_A, lora_B = factors.lora_A, factors.lora_B
        elif change.kind == "LoRA":
            lora_A, lora_B = tensors["A"].flatten(1), tensors["B"].flatten(1)
            if "mid" in tensors:
                lora_A = to_float(tensors["mid"]).flatten(1) @ to_float(lora_A)
            if lora_A.shape[1] < change.target.in_features:
                # For a model that reads less, see `FusedLinear.narrow`: what is read besides does not concern it.
                lora_A = nn.functional.pad(to_float(lora_A), (0, change.target.in_features - lora_A.shape[1]))
        else:
            raise ValueError(f"{change.kind} needs the result of product_factors.")
        scaling = _alpha_scale(change, tensors) if scale is None else scale
        layers += split(change.target, lora_A, lora_B, scaling, _magnitude(tensors))
        if "up_bias" in tensors:
            vectors += split_bias(change.target, own_vector(tensors["up_bias"]), scaling)
    return Converted(tuple(layers), tuple(vectors))


def product_factors(change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance) -> Factors:
    """The low-rank matrices of a LoHa or of a difference, without alpha: exact, or cut as the tolerance says.

    Raises:
        LoraError: even the largest allowed rank leaves too large an error.
    """
    cut = change.approximated(tolerance)
    if change.kind == "difference":
        matrix = to_float(tensors["diff"]).flatten(1)
        factors = lowrank.sketch(matrix, tolerance.error, tolerance.max_rank) if cut else lowrank.whole(matrix)
    else:
        left1, right1, left2, right2 = _hadamard_sides(tensors)
        if change.rank > tolerance.max_rank:  # as large as the weight, but smaller than its factors
            factors = lowrank.sketch((left1 @ right1) * (left2 @ right2), tolerance.error, tolerance.max_rank)
        else:
            factors = lowrank.hadamard(left1, right1, left2, right2)
            if cut:
                factors = lowrank.compress(factors, tolerance.error, tolerance.max_rank)
    if factors.error > tolerance.max_error:
        raise LoraError(
            f"{change.source}: the {change.kind} on '{change.name}' has rank {change.rank}; the {tolerance.max_rank} "
            f"that the accelerated model keeps leave {factors.error:.0%} of it out, expected at most "
            f"{tolerance.max_error:.0%}. Use ComfyUI's Load Diffusion Model for this file, or one of lower rank."
        )
    return factors


def _hadamard_sides(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The two products of a LoHa: (out_features, r), (r, in_features), and again."""
    sides = [to_float(tensors[role]).flatten(1) for role in LOHA]
    if "hada_t1" in tensors:
        middles = [to_float(tensors[role]).flatten(1) for role in ("hada_t1", "hada_t2")]
        return [sides[0].T, middles[0] @ sides[1], sides[2].T, middles[1] @ sides[3]]
    return sides


def _kind(source: str, name: str, pieces: Mapping[str, Piece]) -> str:
    found = {
        kind
        for kind, roles in COMPANIONS.items()
        if any(role in pieces for role in roles if role not in ("alpha", "dora_scale"))
    }
    if len(found) > 1:
        raise LoraError(
            f"{source}: '{name}' is changed in two ways at once, {' and '.join(sorted(found))}: its meaning is not "
            "defined. Choose a file that has one of them."
        )
    if found:
        return found.pop()
    if "diff_b" in pieces and not {"alpha", "dora_scale"} & pieces.keys():
        return "bias"
    keys = ", ".join(f"'{piece.key}'" for piece in pieces.values())
    raise LoraError(
        f"{source}: {keys} of '{name}' scale a change that is not there. The file is incomplete: get it again."
    )


def _alpha_scale(change: Change, tensors: Mapping[str, Tensor]) -> float:
    """Alpha / rank, as each kind counts its rank."""
    if "alpha" not in tensors:
        return 1.0
    alpha = float(tensors["alpha"])
    if change.kind in ("LoRA", "GLoRA"):
        return alpha / change.rank
    # LoKr: of the last factor that is a product; with none, ComfyUI and LyCORIS ignore alpha.
    roles = ("hada_w1_b",) if change.kind == "LoHa" else ("lokr_w2_b", "lokr_w1_b")
    for role in roles:
        if role in change.pieces:
            return alpha / change.pieces[role].shape[0]
    return 1.0


def _split_lokr(
    change: Change, tensors: Mapping[str, Tensor], tolerance: Tolerance
) -> list[LoraLayer] | list[KroneckerLayer]:
    target, scale, magnitude = change.target, _alpha_scale(change, tensors), _magnitude(tensors)
    sides = [_kron_side(tensors, role) for role in ("lokr_w1", "lokr_w2")]
    left, right = (side if isinstance(side, Tensor) else side.lora_B @ side.lora_A for side in sides)
    low_rank = change.rank * (target.in_features + target.out_features)
    if change.rank <= tolerance.exact_rank and low_rank <= multiplications(left.shape, right.shape):
        factors = lowrank.kronecker(*(lowrank.whole(to_float(s)) if isinstance(s, Tensor) else s for s in sides))
        return split(target, factors.lora_A, factors.lora_B, scale, magnitude)
    return split_kronecker(target, left, right, scale, magnitude)


def _split_glora(change: Change, tensors: Mapping[str, Tensor]) -> list[Layer]:
    target, scale = change.target, _alpha_scale(change, tensors)
    columns, lora_A, up, down = (tensors[role].flatten(1) for role in glora_roles(target, change.pieces))
    inputs = [InputLayer(part.module, columns, lora_A, scale, part.rows) for part in target.parts]
    # ComfyUI adds both to the weight at once: what reads the weight comes first.
    return [*inputs, *split(target, down, up, scale)]


def _kron_side(tensors: Mapping[str, Tensor], role: str) -> Tensor | Factors:
    """One side of a LoKr: a matrix in the file's dtype, or the two that it is the product of."""
    if role in tensors:
        return tensors[role].flatten(1)
    left, right = to_float(tensors[f"{role}_a"].flatten(1)), to_float(tensors[f"{role}_b"].flatten(1))
    if role == "lokr_w2" and "lokr_t2" in tensors:
        left, right = left.T.contiguous(), to_float(tensors["lokr_t2"]).flatten(1) @ right
    return Factors(right, left)


def _magnitude(tensors: Mapping[str, Tensor]) -> Magnitude | None:
    for role, after in (("dora_scale", False), ("magnitude", True)):
        if role in tensors:
            return Magnitude(own_vector(tensors[role]), after)
    return None


def _turn(change: Change, tensors: Mapping[str, Tensor]) -> Tensor:
    """(R - I)ᵀ of the rotations R that the blocks say."""
    if "rescale" in tensors and bool((to_float(tensors["rescale"]) != 1.0).any()):
        raise LoraError(
            f"{change.source}: '{change.pieces['rescale'].key}' rescales the rotated weight, which ComfyUI leaves out; "
            f"what it should look like is not defined. {INSTEAD}"
        )
    blocks = tensors["oft_blocks"].double()
    skew = blocks - blocks.transpose(1, 2)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    if alpha > 0.0:
        length = float(skew.norm()) + 1e-8
        skew = skew * min(1.0, alpha / length)
    identity = torch.eye(blocks.shape[1], dtype=torch.float64)
    rotation = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return (rotation - identity).transpose(1, 2).float().contiguous()
