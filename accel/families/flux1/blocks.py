"""The two block types of FLUX.1, as functions over diffusers' blocks. Each is one compiled region.

They compute what diffusers' blocks do, with the same submodules, but take the activated conditioning and the rotary
tables ready-made (they do not change from block to block), and keep text and image tokens in one tensor through the
single blocks, where diffusers joins and splits them in every block.

Shapes: b batch, t text tokens, i image tokens (references included), n = t + i of them, heads of d = 128 columns each,
h = heads · d hidden size. hidden_states and what is computed of them have the transformer's dtype; nothing is mutated.

Source: Esser et al., https://arxiv.org/abs/2403.03206; black-forest-labs/flux modules/layers.py, DoubleStreamBlock and
SingleStreamBlock.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...attention import Attention
from ...linear.inputs import GELU_TANH, Modulated, modulated
from ...linear.layers import joint_linears, linears, split_linears
from ..streams.heads import attend, heads, joint_heads, within_float16


def double_block(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """One double-stream block.

    Args:
        block: a diffusers `FluxTransformerBlock`.
        hidden_states: ``b i h``.
        encoder_hidden_states: ``b t h``.
        temb: ``b h``, SiLU already applied.
        rotary: ``2 b 1 n (d / 2)`` cosines and sines, float32, text positions first;
            b is 1 or the batch size.
        mask: see `accel.attention.sdpa`, or None.
        attention: the engine's attention backend.

    Returns:
        hidden_states ``b i h`` and encoder_hidden_states ``b t h``.
    """
    attn, text_tokens = block.attn, encoder_hidden_states.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1.linear(temb)[:, None].chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = (
        block.norm1_context.linear(temb)[:, None].chunk(6, dim=-1)
    )
    query, key, value = joint_linears(
        modulated(encoder_hidden_states, c_shift, c_scale, block.norm1_context.norm.eps),
        modulated(hidden_states, shift, scale, block.norm1.norm.eps),
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.to_q, attn.to_k, attn.to_v),
    )
    query, key = joint_heads(attn, query, key, text_tokens, rotary)
    joint = attend(query, key, value, mask, attention)
    text, image = split_linears(joint, text_tokens, attn.to_add_out, attn.to_out[0])

    hidden_states = hidden_states + gate * image
    image = modulated(hidden_states, shift_mlp, scale_mlp, block.norm2.eps)
    hidden_states = hidden_states + gate_mlp * _feed_forward(image, block.ff)

    encoder_hidden_states = encoder_hidden_states + c_gate * text
    text = modulated(encoder_hidden_states, c_shift_mlp, c_scale_mlp, block.norm2_context.eps)
    encoder_hidden_states = encoder_hidden_states + c_gate_mlp * _feed_forward(text, block.ff_context)
    return hidden_states, within_float16(encoder_hidden_states)


def single_block(
    block: nn.Module, hidden_states: Tensor, temb: Tensor, rotary: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """One single-stream block.

    Args:
        block: a diffusers `FluxSingleTransformerBlock`.
        hidden_states: ``b (t i) h``.
        temb: see `double_block`.
        rotary: see `double_block`.
        mask: see `double_block`.
        attention: see `double_block`.

    Returns:
        ``b (t i) h``.
    """
    attn = block.attn
    shift, scale, gate = block.norm.linear(temb)[:, None].chunk(3, dim=-1)
    normed = modulated(hidden_states, shift, scale, block.norm.norm.eps)
    query, key, value, mlp = linears(normed, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp, activation=GELU_TANH)
    query, key = heads(attn, query, key, rotary)
    attended = attend(query, key, value, mask, attention)
    hidden_states = hidden_states + gate * linears(mlp.after(attended), block.proj_out)[0]
    return within_float16(hidden_states)


def _feed_forward(x: Modulated, feed_forward: nn.Module) -> Tensor:
    """``b n h -> b n h`` through diffusers' `FeedForward`: linear, GELU (tanh), linear."""
    activation, _, output = feed_forward.net
    return linears(linears(x, activation.proj, activation=GELU_TANH)[0], output)[0]
