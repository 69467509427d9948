"""The two kinds of block, as functions over a family's modules. What differs from family to family is handed in.

They compute what diffusers' blocks do, with the same submodules, but take the modulation and the rotary tables
ready-made, and keep text and image tokens in one tensor through the single blocks, where diffusers joins and splits
them in every block.

Shapes: b batch, t text tokens, i image tokens (references included), n = t + i of them, heads of d = 128 columns each,
h = heads · d hidden size. hidden_states and what is computed of them have the transformer's dtype; nothing is mutated.

Source: Esser et al., https://arxiv.org/abs/2403.03206; black-forest-labs/flux modules/layers.py, DoubleStreamBlock and
SingleStreamBlock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...attention import Attention
from ...linear.inputs import Activation, Input, modulated
from ...linear.layers import LoraLinear, joint_linears, linears, split_linears
from .heads import attend, heads, joint_heads, within_float16
from .inside import InsideAttention

Modulation = Sequence[Tensor]
"""Shift, scale and gate, ``b 1 h`` each, or ``b n h`` where each token has its own; twice for a double block, for
attention and for the MLP."""

FeedForward = Callable[[Input, nn.Module], Tensor]
"""Runs a block's MLP: ``b n h -> b n h``."""


def double_stream(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    image_modulation: Modulation,
    text_modulation: Modulation,
    eps: float,
    feed_forward: FeedForward,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None,
) -> tuple[Tensor, Tensor]:
    """One double block.

    Args:
        block: with `attn`, `ff` and `ff_context` as diffusers' blocks have them.
        hidden_states: ``b i h``.
        encoder_hidden_states: ``b t h``.
        image_modulation: of the image tokens.
        text_modulation: of the text tokens.
        eps: of the layer norms.
        feed_forward: runs `ff` and `ff_context`.
        rotary: ``2 b 1 n (d / 2)`` cosines and sines, float32, text positions first;
            b is 1 or the batch size.
        mask: see `accel.attention.sdpa`, or None.
        attention: the engine's attention backend.
        inside: what others do inside it.

    Returns:
        hidden_states ``b i h`` and encoder_hidden_states ``b t h``.
    """
    attn, text_tokens = block.attn, encoder_hidden_states.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = image_modulation
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = text_modulation
    query, key, value = joint_linears(
        modulated(encoder_hidden_states, c_shift, c_scale, eps),
        modulated(hidden_states, shift, scale, eps),
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.to_q, attn.to_k, attn.to_v),
    )
    query, key = joint_heads(attn, query, key, text_tokens)
    joint = attend(query, key, value, rotary, mask, attention, inside)
    text, image = split_linears(joint, text_tokens, attn.to_add_out, attn.to_out[0])

    hidden_states = hidden_states + gate * image
    image = modulated(hidden_states, shift_mlp, scale_mlp, eps)
    hidden_states = hidden_states + gate_mlp * feed_forward(image, block.ff)

    encoder_hidden_states = encoder_hidden_states + c_gate * text
    text = modulated(encoder_hidden_states, c_shift_mlp, c_scale_mlp, eps)
    encoder_hidden_states = encoder_hidden_states + c_gate_mlp * feed_forward(text, block.ff_context)
    return hidden_states, within_float16(encoder_hidden_states)


def single_stream(
    attn: nn.Module,
    hidden_states: Tensor,
    modulation: Modulation,
    eps: float,
    mlp: LoraLinear,
    out: LoraLinear,
    activation: Activation,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None,
) -> Tensor:
    """One single block: attention and MLP beside each other.

    Args:
        attn: with `to_q`, `to_k`, `to_v`, and the norms of heads.
        hidden_states: ``b (t i) h``.
        modulation: of all tokens.
        eps: of the layer norm.
        mlp: reads what attention reads.
        out: reads attention and the activated MLP side by side.
        activation: of the MLP.
        rotary: see `double_stream`.
        mask: see `double_stream`.
        attention: see `double_stream`.
        inside: see `double_stream`.

    Returns:
        ``b (t i) h``.
    """
    shift, scale, gate = modulation
    normed = modulated(hidden_states, shift, scale, eps)
    query, key, value, inner = linears(normed, attn.to_q, attn.to_k, attn.to_v, mlp, activation=activation)
    query, key = heads(attn, query, key)
    attended = attend(query, key, value, rotary, mask, attention, inside)
    hidden_states = hidden_states + gate * linears(inner.after(attended), out)[0]
    return within_float16(hidden_states)
