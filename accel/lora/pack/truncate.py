"""A stack cut to a lower rank, where its ranks add up beyond what pays."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kinds.layers import LoraLayer
from ..kinds.lowrank import Factors, compress, overall_error
from .flat import FlatLora, flat_buffer
from .layout import BufferLayout, LowRanks


@dataclass(frozen=True)
class Truncated:
    """A stack of lower rank, and what that costs.

    Attributes:
        flat: ready to bind.
        max_error: the largest relative Frobenius error of one group of linears, of those that share a lora_A.
        overall_error: the same over all of them.
    """

    flat: FlatLora
    max_error: float
    overall_error: float


def truncate(flat: FlatLora, max_rank: int) -> Truncated:
    """Keep the largest singular values of every low-rank change; all others stay as they are, and do not count.

    Takes QR of both sides and the SVD of the small core between them, in float32. Linears of a fused layer, which share
    their lora_A, are cut together and go on sharing it.

    Args:
        flat: on the host, as `flatten` makes it.
        max_rank: of every linear; those that have no more stay bit for bit.

    Raises:
        ValueError: the rank is less than 1.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}, expected 1 or more.")
    groups: dict[int, list[str]] = defaultdict(list)
    for module, place in flat.placed.items():
        groups[place.a_start].append(module)
    layers: dict[str, LowRanks] = {}
    errors: dict[str, tuple[float, float]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for modules in groups.values():
            places = [flat.placed[module] for module in modules]
            lora_A = _matrix(flat.buffer, places[0].a_start, places[0].a_shape)
            sides = [_matrix(flat.buffer, place.b_start, place.b_shape) for place in places]
            factors = Factors(lora_A, torch.cat(sides))
            # Rows of zeros fill the rank up, see `layout.RANK_ALIGNMENT`.
            if int(lora_A.any(dim=1).sum()) <= max_rank:
                errors[modules[0]] = (0.0, _norm(factors))
            else:
                cut = compress(factors, 0.0, max_rank)
                errors[modules[0]] = (cut.error, cut.norm)
                lora_A, sides = cut.lora_A, list(cut.lora_B.split([place.b_shape[0] for place in places]))
            for module, lora_B in zip(modules, sides, strict=True):
                layers[module] = [(LoraLayer(module, lora_A, lora_B, 1.0), 1.0)]
        # Where Kronecker products lie, before every lora_A.
        start = min((place.a_start for place in flat.placed.values()), default=len(flat.buffer))
        layout = BufferLayout(flat.buffer.dtype, start)
        buffer, placed = flat_buffer(layers, flat.buffer.dtype, flat.buffer.is_pinned(), None, layout)
        buffer[:start] = flat.buffer[:start]
    return Truncated(replace(flat, buffer=buffer, placed=placed), *overall_error(errors))


def _matrix(buffer: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    return buffer.as_strided(shape, (shape[1], 1), start)


def _norm(factors: Factors) -> float:
    """The Frobenius norm of B @ A, from the small products of each side with itself."""
    lora_A, lora_B = factors.lora_A.double(), factors.lora_B.double()
    return float(((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum().clamp(min=0.0).sqrt())
