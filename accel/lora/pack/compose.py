"""What the layers of one linear become under a stack: low-rank matrices, Kronecker products, a mixing of its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kinds.composed import BaseWeights, Composed, KroneckerTerm
from ..kinds.layers import Layer, LoraLayer
from ..stack import StackEntry
from .layout import LowRanks


@dataclass(frozen=True)
class Parts:
    """What is bound beside one linear's weight.

    Attributes:
        low_rank: layers and their strengths; their columns in this order make lora_B.
        kroneckers: Kronecker products, in the stack's order.
        mixing: (blocks, b, b) float32, what the base's output is multiplied with; None for the identity.
    """

    low_rank: LowRanks
    kroneckers: Sequence[KroneckerTerm]
    mixing: Tensor | None = None


def parts_of(module: str, layers: Sequence[tuple[Layer, float]], base: BaseWeights | None) -> Parts:
    """Apply the layers of one linear one after another, each at its strength.

    Args:
        module: the linear.
        layers: in the stack's order, with their strengths.
        base: asked only where a layer depends on the weight.

    Raises:
        LoraError: see `kinds.layers.Layer.apply`.
        ValueError: a layer depends on the weight, and there is no base.
    """
    if all(layer.only_adds for layer, _ in layers):  # as the file has them, rounded once
        low_ranks = ((layer.low_rank, strength) for layer, strength in layers)
        kroneckers = ((layer.kronecker, strength) for layer, strength in layers)
        return Parts(
            [(layer, strength) for layer, strength in low_ranks if layer is not None],
            [layer.term(strength) for layer, strength in kroneckers if layer is not None],
        )
    state = Composed.unchanged(module, layers[0][0].rows, base)
    for layer, strength in layers:
        state = layer.apply(state, strength)
    columns = state.lora_B.split([len(lora_A) for lora_A in state.lora_As], dim=1) if state.lora_As else ()
    low_rank = [
        (LoraLayer(module, lora_A, lora_B, 1.0), 1.0) for lora_A, lora_B in zip(state.lora_As, columns, strict=True)
    ]
    return Parts(low_rank, state.kroneckers, state.mixing)


def parts_by_module(
    entries: Sequence[StackEntry], base: BaseWeights | None, order: Sequence[str]
) -> dict[str, Parts]:
    """What each linear gets that a stack changes: first those of an order, in it; then all others, in the stack's."""
    by_module: dict[str, list[tuple[Layer, float]]] = defaultdict(list)
    for entry in entries:
        for layer in entry.adapter.layers:
            by_module[layer.module].append((layer, entry.strength))
    ordered = dict.fromkeys((*order, *by_module))
    return {module: parts_of(module, by_module[module], base) for module in ordered if module in by_module}
