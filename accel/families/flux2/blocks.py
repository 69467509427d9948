"""The two block types of FLUX.2. Each is one compiled region.

All blocks of a kind share one modulation, which is computed once per step. No linear has a bias; the MLP is SwiGLU.

Shapes: see `streams.blocks`. m is 1, or 2 where reference tokens are modulated otherwise than the others.

Source: black-forest-labs/flux2 model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...attention import Attention
from ...linear.inputs import SILU_GATE, Input
from ...linear.layers import linears
from ..streams.blocks import Modulation, double_stream, single_stream
from ..streams.inside import InsideAttention


def double_block(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    image_modulation: Tensor,
    text_modulation: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    references: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None = None,
) -> tuple[Tensor, Tensor]:
    """One double-stream block.

    Args:
        block: a diffusers `Flux2TransformerBlock`.
        hidden_states: ``b i h``.
        encoder_hidden_states: ``b t h``.
        image_modulation: ``b m (6 h)``.
        text_modulation: ``b 1 (6 h)``.
        rotary: see `streams.blocks.double_stream`.
        mask: likewise.
        references: ``i`` bool, which image tokens the second of two modulations is for; None: there is one.
        attention: see `streams.blocks.double_stream`.
        inside: likewise.

    Returns:
        hidden_states ``b i h`` and encoder_hidden_states ``b t h``.
    """
    image = _of_tokens(image_modulation, 6, references)
    text = _of_tokens(text_modulation, 6, None)
    eps = block.norm1.eps
    return double_stream(
        block, hidden_states, encoder_hidden_states, image, text, eps, _feed_forward, rotary, mask, attention, inside
    )


def single_block(
    block: nn.Module,
    hidden_states: Tensor,
    modulation: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    references: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None = None,
) -> Tensor:
    """One single-stream block.

    Args:
        block: a diffusers `Flux2SingleTransformerBlock`, changed by `model.build`.
        hidden_states: ``b (t i) h``.
        modulation: ``b m (3 h)``.
        rotary: see `double_block`.
        mask: see `double_block`.
        references: ``(t i)``, see `double_block`.
        attention: see `double_block`.
        inside: see `double_block`.

    Returns:
        ``b (t i) h``.
    """
    attn = block.attn
    return single_stream(
        attn,
        hidden_states,
        _of_tokens(modulation, 3, references),
        block.norm.eps,
        attn.to_mlp,
        attn.to_out,
        SILU_GATE,
        rotary,
        mask,
        attention,
        inside,
    )


def _of_tokens(modulation: Tensor, count: int, references: Tensor | None) -> Modulation:
    """``b m (count h)`` as `count` tensors, ``b 1 h``, or ``b n h`` where tokens differ."""
    if references is None:
        return modulation.chunk(count, dim=-1)
    others, of_references = (each.chunk(count, dim=-1) for each in modulation.split(1, dim=1))
    return [torch.where(references[:, None], *pair) for pair in zip(of_references, others, strict=True)]


def _feed_forward(x: Input, feed_forward: nn.Module) -> Tensor:
    """``b n h -> b n h`` through diffusers' `Flux2FeedForward`: linear, SwiGLU's gate, linear."""
    return linears(linears(x, feed_forward.linear_in, activation=SILU_GATE)[0], feed_forward.linear_out)[0]
