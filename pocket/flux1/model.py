"""Pocket FLUX's transformer: sizes, and its blocks over modules that PEFT can wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accel.families.flux1 import Flux1, Flux1Config, Flux1Inputs
from accel.families.flux1.forward import Flux1Forward

from ..model import Transformer, attend, heads, joint


def _double(
    block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """A double block as `accel.families.flux1.blocks.double_block` computes it."""
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1.linear(temb)[:, None].chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = (
        block.norm1_context.linear(temb)[:, None].chunk(6, dim=-1)
    )
    image = block.norm1.norm(hidden_states) * (1 + scale) + shift
    text = block.norm1_context.norm(encoder_hidden_states) * (1 + c_scale) + c_shift
    attended = joint(attn, image, text, rotary, mask)
    tokens = encoder_hidden_states.shape[1]
    hidden_states = hidden_states + gate * attn.to_out[0](attended[:, tokens:])
    image = block.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
    hidden_states = hidden_states + gate_mlp * block.ff(image)
    encoder_hidden_states = encoder_hidden_states + c_gate * attn.to_add_out(attended[:, :tokens])
    text = block.norm2_context(encoder_hidden_states) * (1 + c_scale_mlp) + c_shift_mlp
    return hidden_states, encoder_hidden_states + c_gate_mlp * block.ff_context(text)


def _single(block: nn.Module, hidden_states: Tensor, temb: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
    """A single block, likewise."""
    attn = block.attn
    shift, scale, gate = block.norm.linear(temb)[:, None].chunk(3, dim=-1)
    normed = block.norm.norm(hidden_states) * (1 + scale) + shift
    query, key = attn.norm_q(heads(attn.to_q(normed))), attn.norm_k(heads(attn.to_k(normed)))
    attended = attend(query, key, heads(attn.to_v(normed)), rotary, mask)
    mlp = block.act_mlp(block.proj_mlp(normed))
    return hidden_states + gate * block.proj_out(torch.cat([attended, mlp], dim=-1))


TRANSFORMER = Transformer(
    family=Flux1(),
    config=Flux1Config(
        hidden_size=128,
        depth=1,
        depth_single=4,
        in_channels=64,
        out_channels=64,
        context_dim=32,
        pooled_dim=16,
        mlp_dim=512,
        guidance=False,
    ),
    inputs=Flux1Inputs,
    forward=Flux1Forward,
    double=_double,
    single=_single,
    zero=("bias", ".norm.linear.weight", ".norm1.linear.weight", ".norm1_context.linear.weight"),
)
