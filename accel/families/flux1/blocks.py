"""The two block types of FLUX.1, as functions over diffusers' blocks. Each is one compiled region.

They compute what diffusers' blocks do, with the same submodules, but take the activated conditioning and the rotary
tables ready-made (they do not change from block to block), and keep text and image tokens in one tensor through the
single blocks, where diffusers joins and splits them in every block.

Shapes: B batch, T text tokens, I image tokens (references included), N = T + I, H hidden size, D = 128 head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...attention import Attention
from ...lora.layers import linears
from .config import HEAD_DIM

FLOAT16_MAX = 65504.0


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
        hidden_states: (B, I, H).
        encoder_hidden_states: (B, T, H).
        temb: (B, H), SiLU already applied.
        rotary: (2, B or 1, 1, N, D/2) cosines and sines, float32, text positions first.
        mask: see `accel.attention.sdpa`, or None.
        attention: the engine's attention backend.

    Returns:
        hidden_states (B, I, H) and encoder_hidden_states (B, T, H).
    """
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1.linear(temb)[:, None].chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = (
        block.norm1_context.linear(temb)[:, None].chunk(6, dim=-1)
    )
    image = _modulate(block.norm1.norm(hidden_states), shift, scale)
    text = _modulate(block.norm1_context.norm(encoder_hidden_states), c_shift, c_scale)

    image_q, image_k, image_v = map(_heads, linears(image, attn.to_q, attn.to_k, attn.to_v))
    text_q, text_k, text_v = map(_heads, linears(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    query = _join(attn.norm_added_q(text_q), attn.norm_q(image_q))
    key = _join(attn.norm_added_k(text_k), attn.norm_k(image_k))
    value = _join(text_v, image_v)
    joint = _attend(query, key, value, rotary, mask, attention)
    text_tokens = encoder_hidden_states.shape[1]
    text, image = joint[:, :text_tokens], joint[:, text_tokens:]

    hidden_states = hidden_states + gate * attn.to_out[0](image)
    image = _modulate(block.norm2(hidden_states), shift_mlp, scale_mlp)
    hidden_states = hidden_states + gate_mlp * block.ff(image)

    encoder_hidden_states = encoder_hidden_states + c_gate * attn.to_add_out(text)
    text = _modulate(block.norm2_context(encoder_hidden_states), c_shift_mlp, c_scale_mlp)
    encoder_hidden_states = encoder_hidden_states + c_gate_mlp * block.ff_context(text)
    return hidden_states, _within_float16(encoder_hidden_states)


def single_block(
    block: nn.Module, hidden_states: Tensor, temb: Tensor, rotary: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    """One single-stream block.

    Args:
        block: a diffusers `FluxSingleTransformerBlock`.
        hidden_states: (B, N, H), text tokens first.
        temb: see `double_block`.
        rotary: see `double_block`.
        mask: see `double_block`.
        attention: see `double_block`.

    Returns:
        (B, N, H).
    """
    attn = block.attn
    shift, scale, gate = block.norm.linear(temb)[:, None].chunk(3, dim=-1)
    normed = _modulate(block.norm.norm(hidden_states), shift, scale)
    query, key, value, mlp = linears(normed, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    query, key, value = attn.norm_q(_heads(query)), attn.norm_k(_heads(key)), _heads(value)
    attended = _attend(query, key, value, rotary, mask, attention)
    mlp = block.act_mlp(mlp)
    hidden_states = hidden_states + gate * block.proj_out(torch.cat([attended, mlp], dim=-1))
    return _within_float16(hidden_states)


def _modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normed * (1 + scale) + shift


def _heads(projected: Tensor) -> Tensor:
    # (B, N, heads, D), as the linears leave them and the next one reads them: attention gets a transposed view.
    return projected.unflatten(-1, (-1, HEAD_DIM))


def _join(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text, image], dim=1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rotary: Tensor, mask: Tensor | None, attention: Attention
) -> Tensor:
    query, key, value = (heads.transpose(1, 2) for heads in (_rotate(query, rotary), _rotate(key, rotary), value))
    return attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    # Pairs of neighbouring channels turn together, as in black-forest-labs/flux math.py, apply_rope(). Written as one
    # sum over whole heads, which inductor computes in one kernel; two halves that are stacked it writes out in float32.
    cos, sin = (table.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, -1, 2).flatten(-2) for table in rotary)
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (heads.float() * cos + across.float() * sin).to(heads.dtype)


def _within_float16(hidden_states: Tensor) -> Tensor:
    # FLUX's residual stream exceeds float16's range; ComfyUI and diffusers clamp at the same places.
    if hidden_states.dtype == torch.float16:
        return hidden_states.nan_to_num(nan=0.0, posinf=FLOAT16_MAX, neginf=-FLOAT16_MAX)
    return hidden_states
