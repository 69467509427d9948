"""Attention as both kinds of block compute it: norms of heads, rotary positions, the product itself.

Shapes: b batch, t text tokens, i image tokens (references included), n = t + i of them, heads of d = 128 columns each.

Source: black-forest-labs/flux modules/layers.py and math.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...attention import Attention
from .inside import InsideAttention
from .layout import HEAD_DIM

FLOAT16_MAX = 65504.0


def joint_heads(attn: nn.Module, query: Tensor, key: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Query and key of both streams, ``b (t i) (heads d)``, normed by each stream's scales: see `norm`."""
    is_text = torch.arange(query.shape[1], device=query.device)[:, None, None] < text_tokens
    query_scale = torch.where(is_text, attn.norm_added_q.weight, attn.norm_q.weight)
    key_scale = torch.where(is_text, attn.norm_added_k.weight, attn.norm_k.weight)
    return norm(query, query_scale, attn.norm_q.eps), norm(key, key_scale, attn.norm_k.eps)


def heads(attn: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key, ``b n (heads d)``, normed: see `norm`."""
    return norm(query, attn.norm_q.weight, attn.norm_q.eps), norm(key, attn.norm_k.weight, attn.norm_k.eps)


def norm(projected: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS norm of each head: ``b n (heads d) -> b n heads d`` float32; scale ``d``, or ``n 1 d`` of each token."""
    split = _split_last(projected, HEAD_DIM).float()
    return split * torch.rsqrt(split.square().mean(dim=-1, keepdim=True) + eps) * scale.float()


def rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    """Turn ``b n heads (pairs 2)`` float32 by the angles of the rotary table, ``2 b 1 n pairs``."""
    # Pairs of neighbouring channels turn together, as in black-forest-labs/flux math.py, apply_rope(). Written as one
    # sum over whole heads, which inductor computes in one kernel; two halves that are stacked it writes out.
    cos, sin = (table.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, -1, 2).flatten(-2) for table in rotary)
    even, odd = _split_last(heads, 2).unbind(-1)
    return heads * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention | None,
) -> Tensor:
    """Attention over query and key, ``b n heads d`` float32, and value, ``b n (heads d)``: ``b n (heads d)``."""
    if inside is not None:
        return _attend_with(query, key, value, rotary, mask, attention, inside)
    query, key = rotate(query, rotary), rotate(key, rotary)
    # As the linears leave them and the next one reads them: attention gets a transposed view, ``b heads n d``.
    query, key, value = query.to(value.dtype), key.to(value.dtype), _split_last(value, HEAD_DIM)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    return attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _attend_with(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    attention: Attention,
    inside: InsideAttention,
) -> Tensor:
    dtype = value.dtype
    rows = (query.to(dtype), key.to(dtype), _split_last(value, HEAD_DIM))
    query, key, value, rotary, mask = inside.before(*(each.transpose(1, 2) for each in rows), rotary, mask)
    query, key = (
        rotate(each.transpose(1, 2).float(), rotary[..., : each.shape[2], :]).to(dtype).transpose(1, 2)
        for each in (query, key)
    )
    return inside.after(attention(query, key, value, mask).transpose(1, 2).flatten(2))


def within_float16(hidden_states: Tensor) -> Tensor:
    """The same, ``b n h``; in float16 clamped to its range, NaN to 0."""
    # FLUX's residual stream exceeds float16's range; ComfyUI and diffusers clamp at the same places.
    if hidden_states.dtype == torch.float16:
        return hidden_states.nan_to_num(nan=0.0, posinf=FLOAT16_MAX, neginf=-FLOAT16_MAX)
    return hidden_states


def _split_last(x: Tensor, width: int) -> Tensor:
    """``… (k width) -> … k width``, a view."""
    # Not `unflatten`: under a default device (torch.set_default_device) torch 2.11 cannot trace it.
    return x.view(*x.shape[:-1], -1, width)
