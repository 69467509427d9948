"""What any stack makes of one linear's weight: mixing @ weight + B @ A + Σ mixingᵢ @ kron(leftᵢ, rightᵢ).

Every kind of change keeps this form. A low-rank change adds columns to B, a Kronecker product a term; a rotation T of
the output gives T @ mixing, T @ B and T @ mixingᵢ; DoRA does the same with a diagonal T, after adding its own; GLoRA's
low-rank change of the input adds the columns that the weight so far makes of it. So a stack composes exactly, in its
order, whatever is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...errors import LoraError
from ..adapter import InputLayer, KroneckerLayer, Layer, LoraLayer, RotationLayer, only_adds, to_float

# Rotations with blocks of different sizes share blocks of the least common multiple, up to this size.
MAX_BLOCK = 2048


class BaseWeights(Protocol):
    """The model's own weights, for changes that depend on them."""

    def weight(self, module: str) -> Tensor:
        """A linear's weight: (out_features, in_features) float32 on the CPU, dequantized, not to be written."""

    def parameter(self, name: str) -> Tensor:
        """A bias or the scale of a norm: one dimension, any float dtype."""


@dataclass(frozen=True)
class KroneckerTerm:
    """mixing @ (factor · rows of kron(left, right)).

    Attributes:
        layer: has the matrices; its scale and magnitude are not meant.
        factor: a number, which may be as large as a strength may be.
        mixing: (blocks, b, b) float32, a block-diagonal matrix on the rows; None for the identity.
    """

    layer: KroneckerLayer
    factor: float
    mixing: Tensor | None = None


@dataclass(frozen=True)
class Composed:
    """mixing @ weight + lora_B @ lora_A + the sum of the Kronecker products.

    Attributes:
        mixing: (blocks, b, b) float32, a block-diagonal matrix on the rows; None for the identity.
        lora_A: (rank, in_features) float32: those of the layers that have one, one below the other.
        lora_B: (out_features, rank) float32, with strength and scale folded in.
        kroneckers: one for each Kronecker layer, in the stack's order.
    """

    mixing: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    kroneckers: tuple[KroneckerTerm, ...] = ()


def is_plain(layers: Sequence[tuple[Layer, float]]) -> bool:
    """Whether a linear's layers only add to its weight."""
    return all(only_adds(layer) for layer, _ in layers)


def compose(
    name: str, layers: Sequence[tuple[Layer, float]], base: BaseWeights, shape: tuple[int, int]
) -> Composed:
    """Apply layers one after another, each at its strength, in float32.

    Args:
        name: the module, for `base` and messages.
        layers: in the stack's order, with their strengths.
        base: asked only where a layer depends on the weight.
        shape: (out_features, in_features) of the weight.

    Raises:
        LoraError: rotations whose blocks have no common size that is small enough; rows of length 0 under a DoRA.
    """
    out_features, in_features = shape
    state = Composed(None, torch.zeros(0, in_features), torch.zeros(out_features, 0))
    for layer, strength in layers:
        if isinstance(layer, RotationLayer):
            # ComfyUI multiplies with the strength twice, see `kinds`.
            turned = torch.eye(layer.turn.shape[1]) + strength**2 * layer.turn
            state = _mix(name, turned, state)
        elif isinstance(layer, InputLayer):
            columns = _product(name, state, base, to_float(layer.columns))
            state = _add(state, LoraLayer(name, layer.lora_A, columns, 1.0), strength * layer.scale)
        elif layer.magnitude is None:
            state = _add(state, layer, strength * layer.scale)
        elif layer.magnitude.after:
            state = _add(state, layer, strength * layer.scale)
            gain = layer.magnitude.rows / _row_lengths(name, state, base)
            state = _mix(name, _diagonal(name, gain), state)
        else:
            gain = layer.magnitude.rows / (_row_lengths(name, state, base) + torch.finfo(torch.float32).eps)
            kept = _mix(name, _diagonal(name, 1.0 - strength + strength * gain), state)
            state = _add(kept, layer, strength * layer.scale, gain)
    return state


def mix(mixing: Tensor, rows: Tensor) -> Tensor:
    """A block-diagonal matrix (blocks, b, b) times a matrix (blocks · b, columns)."""
    blocks, size, _ = mixing.shape
    return torch.bmm(mixing, rows.reshape(blocks, size, -1)).reshape(rows.shape)


def _add(state: Composed, layer: LoraLayer | KroneckerLayer, factor: float, gain: Tensor | None = None) -> Composed:
    """Add a layer, its rows multiplied by a gain (out_features,)."""
    if isinstance(layer, KroneckerLayer):
        term = KroneckerTerm(layer, factor, None if gain is None else gain[:, None, None])
        return replace(state, kroneckers=(*state.kroneckers, term))
    scaled = factor if gain is None else factor * gain[:, None]
    return replace(
        state,
        lora_A=torch.cat([state.lora_A, to_float(layer.lora_A)]),
        lora_B=torch.cat([state.lora_B, scaled * to_float(layer.lora_B)], dim=1),
    )


def _mix(name: str, turned: Tensor, state: Composed) -> Composed:
    return Composed(
        _mixed(name, turned, state.mixing),
        state.lora_A,
        mix(turned, state.lora_B) if state.lora_B.shape[1] else state.lora_B,
        tuple(replace(term, mixing=_mixed(name, turned, term.mixing)) for term in state.kroneckers),
    )


def _mixed(name: str, turned: Tensor, mixing: Tensor | None) -> Tensor:
    """The product of two block-diagonal matrices; None is the identity."""
    if mixing is None:
        return turned
    size = math.lcm(turned.shape[1], mixing.shape[1])
    if size > MAX_BLOCK:
        raise LoraError(
            f"LoRAs: '{name}' is rotated in blocks of {mixing.shape[1]} and of {turned.shape[1]} rows, whose "
            f"common size is {size}, expected at most {MAX_BLOCK}. Use one of these OFT files at a time."
        )
    return torch.bmm(_widen(turned, size), _widen(mixing, size))


def _widen(mixing: Tensor, size: int) -> Tensor:
    """The same block-diagonal matrix in larger blocks."""
    blocks, small, _ = mixing.shape
    if small == size:
        return mixing
    ratio = size // small
    wide = torch.zeros(blocks // ratio, ratio, small, ratio, small)
    index = torch.arange(ratio)
    wide[:, index, :, index, :] = mixing.view(blocks // ratio, ratio, small, small).transpose(0, 1)
    return wide.view(blocks // ratio, size, size)


def _diagonal(name: str, gain: Tensor) -> Tensor:
    if not bool(torch.isfinite(gain).all()):
        raise LoraError(
            f"LoRAs: a DoRA on '{name}' divides by the length of a row that is 0. Use ComfyUI's Load Diffusion Model "
            "for this stack."
        )
    return gain[:, None, None]


def _product(name: str, state: Composed, base: BaseWeights, columns: Tensor) -> Tensor:
    """The changed weight times (in_features, n), without forming it."""
    product = base.weight(name) @ columns
    if state.mixing is not None:
        product = mix(state.mixing, product)
    product = product + state.lora_B @ (state.lora_A @ columns)
    for term in state.kroneckers:
        added = term.layer.product() @ columns
        product = product.add(added if term.mixing is None else mix(term.mixing, added), alpha=term.factor)
    return product


def _row_lengths(name: str, state: Composed, base: BaseWeights) -> Tensor:
    weight = base.weight(name)
    if state.mixing is not None:
        weight = mix(state.mixing, weight)
    if state.lora_B.shape[1]:
        weight = torch.addmm(weight, state.lora_B, state.lora_A)
    for term in state.kroneckers:
        product = term.layer.product() if term.mixing is None else mix(term.mixing, term.layer.product())
        weight = weight.add(product, alpha=term.factor)
    return weight.norm(dim=1)
