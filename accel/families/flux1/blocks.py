"""The two block types of FLUX.1. Each is one compiled region.

Each block has modulations of its own, which read the activated conditioning; it does not change from block to block.

Shapes: see `streams.blocks`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...attention import Attention
from ...linear.inputs import GELU_TANH, Input
from ...linear.layers import linears
from ..streams.blocks import double_stream, single_stream
from ..streams.inside import InsideAttention


def double_block(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None = None,
) -> tuple[Tensor, Tensor]:
    """One double-stream block.

    Args:
        block: a diffusers `FluxTransformerBlock`.
        hidden_states: ``b i h``.
        encoder_hidden_states: ``b t h``.
        temb: ``b h``, SiLU already applied.
        rotary: see `streams.blocks.double_stream`.
        mask: likewise.
        attention: likewise.
        inside: likewise.

    Returns:
        hidden_states ``b i h`` and encoder_hidden_states ``b t h``.
    """
    image = block.norm1.linear(temb)[:, None].chunk(6, dim=-1)
    text = block.norm1_context.linear(temb)[:, None].chunk(6, dim=-1)
    eps = block.norm1.norm.eps
    return double_stream(
        block, hidden_states, encoder_hidden_states, image, text, eps, _feed_forward, rotary, mask, attention, inside
    )


def single_block(
    block: nn.Module,
    hidden_states: Tensor,
    temb: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None = None,
) -> Tensor:
    """One single-stream block.

    Args:
        block: a diffusers `FluxSingleTransformerBlock`.
        hidden_states: ``b (t i) h``.
        temb: see `double_block`.
        rotary: see `double_block`.
        mask: see `double_block`.
        attention: see `double_block`.
        inside: see `double_block`.

    Returns:
        ``b (t i) h``.
    """
    modulation = block.norm.linear(temb)[:, None].chunk(3, dim=-1)
    return single_stream(
        block.attn,
        hidden_states,
        modulation,
        block.norm.norm.eps,
        block.proj_mlp,
        block.proj_out,
        GELU_TANH,
        rotary,
        mask,
        attention,
        inside,
    )


def _feed_forward(x: Input, feed_forward: nn.Module) -> Tensor:
    """``b n h -> b n h`` through diffusers' `FeedForward`: linear, GELU (tanh), linear."""
    activation, _, output = feed_forward.net
    return linears(linears(x, activation.proj, activation=GELU_TANH)[0], output)[0]
