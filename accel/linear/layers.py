"""A linear with a place for a LoRA beside it, and how blocks run several of them over one input.

The arithmetic is a custom operator, see `operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import operators  # noqa: F401 - registers them
from .dynamic import int8_linears, quantize_rows, quantized_dtype
from .inputs import PLAIN, Columns, Input, as_input


class LoraLinear(nn.Module):
    """y = M (x Wᵀ) + bias + (x Aᵀ) Bᵀ + Σ Mᵢ (x kron(Lᵢ, Rᵢ)ᵀ).

    Attributes:
        base: the linear: a `torch.nn.Linear`, plain or with a quantized weight, or any module with its interface.
        lora: the slot of everything but W and the bias, see `slot`; None while nothing may run.
    """

    def __init__(self, base: nn.Module) -> None:
        """Wrap a linear. It runs after something was bound, see `slots.LoraSlots`."""
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.register_parameter("lora", None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return linears(x, self)[0]


def linears(x: Tensor | Input, *layers: LoraLinear, gelu_last: bool = False) -> list[Any]:
    """Run linears that read the same input.

    Args:
        x: (…, in_features), or a description of it.
        layers: one or more, with biases.
        gelu_last: the last output goes through GELU (tanh): it is an `Input` of the linear after that, because who
            computes it best depends on what computes the two linears.

    Returns:
        One (…, out_features) per layer.
    """
    x, bases = as_input(x), [layer.base for layer in layers]
    in_product = gelu_last and fuses(x.sources[0]) and all(is_plain(base) for base in bases)
    operands = _operands(x, bases)
    if operands is not None:
        outputs = torch.ops.flux_hotswap.linears(*operands, *_weights(bases), _loras(layers), in_product)
    else:
        value = x.value()
        int8 = {quantized_dtype(base) for base in bases} == {torch.int8}
        outputs = int8_linears(value, bases) if int8 else [base(value) for base in bases]
        torch.ops.flux_hotswap.add_loras_(outputs, value, [base.bias for base in bases], _loras(layers))
    if gelu_last:
        return [*outputs[:-1], Columns((outputs[-1],), gelu=not in_product)]
    return outputs


def joint_linears(
    text: Tensor | Input, image: Tensor | Input, text_layers: Sequence[LoraLinear], image_layers: Sequence[LoraLinear]
) -> list[Tensor]:
    """Run linears over two streams of tokens, whose outputs become one: text first, written in place.

    Args:
        text: (B, T, in_features), or a description of it.
        image: (B, I, in_features), or a description of it.
        text_layers: one or more, with biases.
        image_layers: as many, with the same output sizes.

    Returns:
        One (B, T + I, out_features) per pair of layers.
    """
    text, image = as_input(text), as_input(image)
    layers = [*text_layers, *image_layers]
    bases = [layer.base for layer in layers]
    streams = _operands(text, bases), _operands(image, bases)
    if None not in streams:
        operands = [operand for stream in streams for operand in stream]
        return torch.ops.flux_hotswap.joint_linears(*operands, *_weights(bases), _loras(layers))
    pairs = zip(linears(text, *text_layers), linears(image, *image_layers), strict=True)
    return [torch.cat(pair, dim=1) for pair in pairs]


def split_linears(joint: Tensor, text_tokens: int, text_layer: LoraLinear, image_layer: LoraLinear) -> list[Tensor]:
    """Run one linear over the first tokens and another over the others.

    Args:
        joint: (B, N, in_features).
        text_tokens: T.
        text_layer: reads (B, T, in_features).
        image_layer: reads (B, N - T, in_features).

    Returns:
        (B, T, out_features) and (B, N - T, out_features).
    """
    layers = (text_layer, image_layer)
    bases = [layer.base for layer in layers]
    operands = _operands(as_input(joint), bases)
    if operands is not None:
        _, _, quantized = operands
        return torch.ops.flux_hotswap.split_linears(joint, quantized, *_weights(bases), _loras(layers), text_tokens)
    return [*linears(joint[:, :text_tokens], text_layer), *linears(joint[:, text_tokens:], image_layer)]


def fuses(x: Tensor) -> bool:
    """Whether what surrounds a product is worth to be part of it: on a GPU, whose libraries and kernels can.

    On a CPU inductor's own kernels around the products are faster than what is in PyTorch's library.
    """
    return x.is_cuda


def is_plain(base: nn.Module) -> bool:
    """Whether a linear holds an ordinary weight, which the operator may multiply by itself."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter


def _operands(x: Input, bases: Sequence[nn.Module]) -> tuple[str, list[Tensor], list[Tensor]] | None:
    """How the operators take an input: its recipe and sources, and its float8 rows with their scale, or nothing.

    None where they cannot run these linears.
    """
    if all(is_plain(base) for base in bases):
        if fuses(x.sources[0]) and x.recipe == PLAIN:
            return PLAIN, x.sources, []
        return PLAIN, [x.value()], []
    if {quantized_dtype(base) for base in bases} != {torch.float8_e4m3fn}:
        return None
    value = x.value()
    if not fuses(value):
        return PLAIN, [value], list(quantize_rows(value, torch.float8_e4m3fn))
    return x.recipe, x.sources, list(quantize_rows(value, torch.float8_e4m3fn, again=x.value()))


def _weights(bases: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, their scales if they are float8, biases."""
    biases = [base.bias for base in bases]
    if is_plain(bases[0]):
        return [base.weight for base in bases], [], biases
    return [base.weight.qdata for base in bases], [base.weight.scale for base in bases], biases


def _loras(layers: Sequence[LoraLinear]) -> list[Tensor]:
    return [layer.lora for layer in layers]
