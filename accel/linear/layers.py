"""A linear with a place for a LoRA beside it, and how blocks run several of them over one input.

The arithmetic is a custom operator, see `operators`; linears whose weights these do not multiply run by themselves, and
an operator adds their LoRAs.

Shapes: b batch, n tokens (t of text, i of images), k in_features, o out_features, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import operators  # noqa: F401 - registers them
from .dynamic import int8_linears, quantize_rows, quantized_dtype
from .inputs import NONE, Activation, Columns, Input, Recipe, as_input
from .product import IN_PRODUCT


class LoraLinear(nn.Module):
    """y = M (x Wᵀ) + bias + (x Aᵀ) Bᵀ + Σ Mᵢ (x kron(Lᵢ, Rᵢ)ᵀ).

    W and the bias are the base's, which may have no bias; the rest is whatever is bound, see `slot.Bound`: A and B of a
    LoRA, M that an orthogonal adapter multiplies the outputs with, Lᵢ and Rᵢ of Kronecker products, mixed by Mᵢ.

    Attributes:
        base: the linear: a `torch.nn.Linear`, plain or with a quantized weight, or any module with its interface.
        lora: the slot of everything but W and the bias, see `slot`; None while nothing may run.
    """

    def __init__(self, base: nn.Module) -> None:
        """Wrap a linear. It runs after something was bound, see `lora.hold.slots.LoraSlots`."""
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.register_parameter("lora", None)

    def forward(self, x: Tensor) -> Tensor:
        """``… k -> … o``, the dtype of x."""
        return linears(x, self)[0]


def linears(x: Tensor | Input, *layers: LoraLinear, activation: Activation = NONE) -> list[Any]:
    """Run linears that read the same input.

    Args:
        x: ``… k``, or a description of it.
        layers: one or more.
        activation: applied to the last output. That one is returned as an `Input`, because it may have to be applied
            by the product that reads it.

    Returns:
        ``… o`` of each layer, the dtype of x; with an activation the last one is a `Columns`.

    Raises:
        RuntimeError: nothing is bound to a layer, see `slot.bound_to`.
    """
    x, bases = as_input(x), [layer.base for layer in layers]
    in_product = activation in IN_PRODUCT and fuses(x.sources[0]) and all(is_plain(base) for base in bases)
    operands = _operands(x, bases)
    if operands is not None:
        fused = activation if in_product else NONE
        outputs = torch.ops.flux_hotswap.linears(*operands, *_weights(bases), _slots(layers), fused)
    else:
        value = x.value()
        int8 = {quantized_dtype(base) for base in bases} == {torch.int8}
        outputs = int8_linears(value, bases) if int8 else [base(value) for base in bases]
        torch.ops.flux_hotswap.add_loras_(outputs, value, [base.bias for base in bases], _slots(layers))
    if activation == NONE:
        return outputs
    return [*outputs[:-1], Columns((outputs[-1],), NONE if in_product else activation)]


def joint_linears(
    text: Tensor | Input, image: Tensor | Input, text_layers: Sequence[LoraLinear], image_layers: Sequence[LoraLinear]
) -> list[Tensor]:
    """Run linears over two streams of tokens, whose outputs become one: text first, written in place.

    Args:
        text: ``b t k``, or a description of it.
        image: ``b i k``, or a description of it.
        text_layers: one or more.
        image_layers: as many, with the same output sizes.

    Returns:
        ``b (t i) o`` of each pair of layers.

    Raises:
        RuntimeError: see `linears`.
    """
    text, image = as_input(text), as_input(image)
    layers = [*text_layers, *image_layers]
    bases = [layer.base for layer in layers]
    streams = _operands(text, bases), _operands(image, bases)
    if None not in streams:
        operands = [operand for stream in streams for operand in stream]
        return torch.ops.flux_hotswap.joint_linears(*operands, *_weights(bases), _slots(layers))
    pairs = zip(linears(text, *text_layers), linears(image, *image_layers), strict=True)
    return [torch.cat(pair, dim=1) for pair in pairs]


def split_linears(joint: Tensor, text_tokens: int, text_layer: LoraLinear, image_layer: LoraLinear) -> list[Tensor]:
    """Run one linear over the first tokens and another over the others.

    Args:
        joint: ``b (t i) k``.
        text_tokens: t.
        text_layer: reads ``b t k``.
        image_layer: reads ``b i k``.

    Returns:
        ``b t o`` and ``b i o``.

    Raises:
        RuntimeError: see `linears`.
    """
    layers = (text_layer, image_layer)
    bases = [layer.base for layer in layers]
    operands = _operands(as_input(joint), bases)
    if operands is not None:
        _, _, quantized = operands
        return torch.ops.flux_hotswap.split_linears(joint, quantized, *_weights(bases), _slots(layers), text_tokens)
    return [*linears(joint[:, :text_tokens], text_layer), *linears(joint[:, text_tokens:], image_layer)]


def fuses(x: Tensor) -> bool:
    """Whether the product should also compute its bias, LoRA and activation: on a GPU.

    On a CPU inductor's own kernels around the products are faster than what is in PyTorch's library.
    """
    return x.is_cuda


def is_plain(base: nn.Module) -> bool:
    """Whether a linear holds an ordinary weight, which the operator may multiply by itself."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter


def _operands(x: Input, bases: Sequence[nn.Module]) -> tuple[Recipe, list[Tensor], list[Tensor]] | None:
    """The operators' view of an input: (recipe, sources, [float8 rows, their scales] or []).

    None where the operators cannot multiply these weights.
    """
    if all(is_plain(base) for base in bases):
        if fuses(x.sources[0]) and x.recipe == NONE:
            return NONE, x.sources, []
        return NONE, [x.value()], []
    if {quantized_dtype(base) for base in bases} != {torch.float8_e4m3fn}:
        return None
    value = x.value()
    if not fuses(value):
        return NONE, [value], list(quantize_rows(value, torch.float8_e4m3fn))
    return x.recipe, x.sources, list(quantize_rows(value, torch.float8_e4m3fn, again=x.value()))


def _weights(bases: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Weights, their scales if they are float8, biases where there are some."""
    biases = [base.bias for base in bases]
    if is_plain(bases[0]):
        return [base.weight for base in bases], [], biases
    return [base.weight.qdata for base in bases], [base.weight.scale for base in bases], biases


def _slots(layers: Sequence[LoraLinear]) -> list[Tensor]:
    return [layer.lora for layer in layers]
