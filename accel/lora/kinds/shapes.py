"""The shapes that each kind of change must have, and what is wrong with one that has others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import LoraError
from ...families.layout import LoraTarget

OTHER = "this file is for a model of another size or kind. Choose a LoRA that was trained for this model."
INSTEAD = "Choose a LoRA without it, or use ComfyUI's Load Diffusion Model for this one."
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Piece:
    """A tensor of a change before its values are read."""

    key: str
    shape: tuple[int, ...]


class Shapes:
    """Checks the shapes of one change and words what is wrong with one."""

    def __init__(self, source: str, name: str, target: LoraTarget, pieces: Mapping[str, Piece]) -> None:
        self.source, self.name, self.target, self.pieces = source, name, target, pieces

    def __contains__(self, role: str) -> bool:
        return role in self.pieces

    def matrix(self, role: str) -> tuple[int, int]:
        """Rows and columns of a matrix, which may be stored as a 1x1 convolution."""
        shape = self._shape(role)
        if len(shape) < 2 or any(size != 1 for size in shape[2:]) or 0 in shape:
            raise LoraError(
                f"{self.source}: '{self.pieces[role].key}' is {shape}, expected a matrix (or a 1x1 convolution): "
                f"{OTHER}"
            )
        return shape[0], shape[1]

    def expect(self, role: str, good: bool, expected: str) -> None:
        """Raise unless a shape is as expected."""
        if not good:
            raise LoraError(
                f"{self.source}: '{self.pieces[role].key}' is {self._shape(role)}, expected {expected}: {OTHER}"
            )

    def vector(self, role: str, size: int) -> None:
        """Raise unless a tensor has so many elements in one dimension."""
        shape = self._shape(role)
        self.expect(role, size in shape and _numel(shape) == size, f"({size},)")

    def need(self, role: str, word: str) -> None:
        """Raise unless a role is there."""
        if role not in self.pieces:
            keys = ", ".join(piece.key for piece in self.pieces.values())
            raise LoraError(
                f"{self.source}: '{self.name}' has {keys} but no {word} matrix. The file is incomplete: get it again."
            )

    def _shape(self, role: str) -> tuple[int, ...]:
        return self.pieces[role].shape


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _check_lora(shapes: Shapes) -> int:
    target = shapes.target
    shapes.need("A", "lora_down / lora_A")
    shapes.need("B", "lora_up / lora_B")
    rank, columns = shapes.matrix("A")
    rows, other = shapes.matrix("B")
    shapes.expect("A", columns in (target.in_features, target.narrow), f"(rank, {target.in_features})")
    shapes.expect("B", rows == target.out_features, f"({target.out_features}, rank)")
    if rank != other:
        raise LoraError(
            f"{shapes.source}: '{shapes.pieces['A'].key}' has rank {rank}, '{shapes.pieces['B'].key}' has rank "
            f"{other}; they must be equal and at least 1. The file is damaged: get it again."
        )
    if "mid" in shapes:
        shapes.expect("mid", shapes.matrix("mid") == (rank, rank), f"({rank}, {rank}, 1, 1)")
    return rank


def _check_loha(shapes: Shapes) -> int:
    target, ranks = shapes.target, []
    for role in LOHA:
        shapes.need(role, role)
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        shapes.need("hada_t1", "hada_t1")
        shapes.need("hada_t2", "hada_t2")
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


def _check_lokr(shapes: Shapes) -> int:
    target = shapes.target
    if "lokr_t2" in shapes and ("lokr_w2" in shapes or "lokr_w2_b" not in shapes):
        shapes.expect("lokr_t2", False, "no middle matrix beside a whole lokr_w2")
    sizes = [_check_kron_side(shapes, role) for role in ("lokr_w1", "lokr_w2")]
    (rows1, columns1, rank1), (rows2, columns2, rank2) = sizes
    role = "lokr_w1" if "lokr_w1" in shapes else "lokr_w1_a"
    shapes.expect(
        role,
        rows1 * rows2 == target.out_features and columns1 * columns2 == target.in_features,
        f"a factor of ({target.out_features}, {target.in_features}) beside one of ({rows2}, {columns2})",
    )
    return rank1 * rank2


def _check_kron_side(shapes: Shapes, role: str) -> tuple[int, int, int]:
    """Rows, columns and rank of one factor."""
    if role in shapes:
        for half in (f"{role}_a", f"{role}_b"):
            if half in shapes:
                shapes.expect(half, False, f"no such matrix beside {role}")
        rows, columns = shapes.matrix(role)
        return rows, columns, min(rows, columns)
    left, right = f"{role}_a", f"{role}_b"
    shapes.need(left, role)
    shapes.need(right, right)
    rank, columns = shapes.matrix(right)
    tucker = role == "lokr_w2" and "lokr_t2" in shapes
    shape = shapes.matrix(left)
    rows, other = (shape[1], shape[0]) if tucker else shape
    shapes.expect(left, other == rank, f"(rows, {rank})")
    if tucker:
        shapes.expect("lokr_t2", shapes.matrix("lokr_t2") == (rank, rank), f"({rank}, {rank}, 1, 1)")
    return rows, columns, rank


def glora_roles(target: LoraTarget, pieces: Mapping[str, Piece]) -> tuple[str, str, str, str]:
    """The roles of a GLoRA's (in_features, r), (r, in_features), (out_features, r) and (r, in_features), in this order.

    LyCORIS has written them in two ways. Where both are possible, it is the older one, as for ComfyUI.
    """
    old, new = ("a2", "a1", "b2", "b1"), ("a1", "a2", "b1", "b2")
    rank = pieces["a1"].shape[0]
    expected = _glora_shapes(target, rank)
    return old if all(pieces[role].shape[:2] == shape for role, shape in zip(old, expected, strict=True)) else new


def _glora_shapes(target: LoraTarget, rank: int) -> tuple[tuple[int, int], ...]:
    down = rank, target.in_features
    return (target.in_features, rank), down, (target.out_features, rank), down


def _check_glora(shapes: Shapes) -> int:
    for role in ("a1", "a2", "b1", "b2"):
        shapes.need(role, role)
        shapes.matrix(role)
    roles = glora_roles(shapes.target, shapes.pieces)
    rank = shapes.matrix(roles[1])[0]
    for role, expected in zip(roles, _glora_shapes(shapes.target, rank), strict=True):
        shapes.expect(role, shapes.matrix(role) == expected, str(expected))
    return rank


def _check_difference(shapes: Shapes) -> int:
    expected = shapes.target.out_features, shapes.target.in_features
    shapes.expect("diff", shapes.matrix("diff") == expected, str(expected))
    return min(expected)


def _check_oft(shapes: Shapes) -> int:
    shapes.need("oft_blocks", "oft_blocks")
    shape, out_features = shapes.pieces["oft_blocks"].shape, shapes.target.out_features
    if len(shape) == 4:
        raise LoraError(
            f"{shapes.source}: '{shapes.pieces['oft_blocks'].key}' is BOFT, whose butterfly mixes all rows of the "
            f"weight: beside the weights it would cost another one of its size. {INSTEAD}"
        )
    good = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == out_features and shape[1] > 1
    shapes.expect("oft_blocks", good, f"(blocks, b, b) with blocks · b = {out_features}")
    if "rescale" in shapes:
        shapes.expect("rescale", _numel(shapes.pieces["rescale"].shape) == out_features, f"{out_features} numbers")
    return 0


def check_companions(shapes: Shapes) -> None:
    """Check what may come with every kind.

    Raises:
        LoraError: a wrong shape, or two that exclude each other.
    """
    out_features = shapes.target.out_features
    for role in ("diff_b", "up_bias", "magnitude"):
        if role in shapes:
            shapes.vector(role, out_features)
    if "alpha" in shapes:
        shapes.expect("alpha", _numel(shapes.pieces["alpha"].shape) == 1, "one number")
    if "dora_scale" in shapes:
        piece = shapes.pieces["dora_scale"]
        if piece.shape == (1, shapes.target.in_features):
            raise LoraError(
                f"{shapes.source}: '{piece.key}' is a DoRA over the input's columns, which scales the weight from "
                f"the right; only one over the output's rows can be carried. {INSTEAD}"
            )
        shapes.expect("dora_scale", piece.shape == (out_features, 1), f"({out_features}, 1)")
        if "magnitude" in shapes:
            shapes.expect("magnitude", False, "no second magnitude beside dora_scale")
    if "magnitude" in shapes and "up_bias" in shapes:
        shapes.expect("up_bias", False, "no bias beside DoRA")


# Kind -> checks its shapes, and gives the rank at which it is exact; 0 for OFT and biases.
CHECKS: Mapping[str, Callable[[Shapes], int]] = {
    "LoRA": _check_lora,
    "LoHa": _check_loha,
    "LoKr": _check_lokr,
    "GLoRA": _check_glora,
    "OFT": _check_oft,
    "difference": _check_difference,
    "bias": lambda shapes: 0,
}
