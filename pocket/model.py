"""Pocket FLUX's transformer while it is trained: diffusers' modules in this pack's forward, its file, its sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from accel.families.flux1 import Flux1, Flux1Config, Flux1Inputs
from accel.families.flux1.forward import Flux1Forward
from accel.families.flux1.layout import checkpoint_layout
from accel.families.streams.forward import Regions
from accel.families.streams.layout import HEAD_DIM

CONFIG = Flux1Config(
    hidden_size=128,
    depth=1,
    depth_single=4,
    in_channels=64,
    out_channels=64,
    context_dim=32,
    pooled_dim=16,
    mlp_dim=512,
    guidance=False,
)


def build(seed: int) -> nn.Module:
    """A new transformer: gates and the last layer begin at zero, so that every block does nothing at first."""
    torch.manual_seed(seed)
    model = Flux1().build(CONFIG).float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            modulation = (".norm.linear.weight", ".norm1.linear.weight", ".norm1_context.linear.weight")
            if name.endswith(("bias", *modulation)):
                parameter.zero_()
        for layer in (model.norm_out.linear, model.proj_out):
            layer.weight.zero_()
    return model


def forward(model: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
    """The velocity, (B, 16, h, w).

    Args:
        model: from `build`, with or without PEFT's layers.
        latents: (B, 16, h, w).
        timestep: (B,), 1 is noise.
        text: (B, S, 32).
        bias: see `text.attention_bias`, or None.
    """
    inputs = Flux1Inputs(latents, timestep, text, attention_mask=bias)
    return Flux1Forward(CONFIG, model, Regions(_double, _single, None, _double, _single))(inputs)


def sample(model: nn.Module, noise: Tensor, text: Tensor, bias: Tensor | None, steps: int) -> Tensor:
    """Latents from noise (B, 16, h, w) by Euler's method; as ComfyUI's `euler` with `simple` and a shift of 1."""
    latents = noise
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            velocity = forward(model, latents, now.expand(len(noise)), text, bias)
            latents = latents + (after - now) * velocity
    return latents


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """The file: bfloat16, in the layout of black-forest-labs/flux."""
    return {name: value.bfloat16().contiguous() for name, value in _original(model.state_dict())}


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo `checkpoint`, in place."""
    layout = checkpoint_layout(CONFIG)
    state = {}
    for linear in layout.linears:
        for kind in ("weight", "bias"):
            value = tensors[f"{linear.name}.{kind}"]
            value = torch.cat(value.chunk(2)[::-1]) if linear.swap_halves else value
            for part in linear.parts:
                state[f"{part.module}.{kind}"] = value[part.start : part.start + part.rows]
    state |= {vector.parameter: tensors[vector.name] for vector in layout.vectors}
    model.load_state_dict(state)


def _original(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    layout = checkpoint_layout(CONFIG)
    for linear in layout.linears:
        for kind in ("weight", "bias"):
            value = torch.cat([state[f"{part.module}.{kind}"] for part in linear.parts])
            yield f"{linear.name}.{kind}", torch.cat(value.chunk(2)[::-1]) if linear.swap_halves else value
    for vector in layout.vectors:
        yield vector.name, state[vector.parameter]


def _double(block, hidden_states, encoder_hidden_states, temb, rotary, mask):
    """A double block as `accel.families.flux1.blocks.double_block` computes it, over modules that PEFT can wrap."""
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1.linear(temb)[:, None].chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = (
        block.norm1_context.linear(temb)[:, None].chunk(6, dim=-1)
    )
    image = block.norm1.norm(hidden_states) * (1 + scale) + shift
    text = block.norm1_context.norm(encoder_hidden_states) * (1 + c_scale) + c_shift
    query = torch.cat([attn.norm_added_q(_heads(attn.add_q_proj(text))), attn.norm_q(_heads(attn.to_q(image)))], dim=2)
    key = torch.cat([attn.norm_added_k(_heads(attn.add_k_proj(text))), attn.norm_k(_heads(attn.to_k(image)))], dim=2)
    value = torch.cat([_heads(attn.add_v_proj(text)), _heads(attn.to_v(image))], dim=2)
    joint = _attend(query, key, value, rotary, mask)
    tokens = encoder_hidden_states.shape[1]
    hidden_states = hidden_states + gate * attn.to_out[0](joint[:, tokens:])
    image = block.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
    hidden_states = hidden_states + gate_mlp * block.ff(image)
    encoder_hidden_states = encoder_hidden_states + c_gate * attn.to_add_out(joint[:, :tokens])
    text = block.norm2_context(encoder_hidden_states) * (1 + c_scale_mlp) + c_shift_mlp
    return hidden_states, encoder_hidden_states + c_gate_mlp * block.ff_context(text)


def _single(block, hidden_states, temb, rotary, mask):
    """A single block, likewise."""
    attn = block.attn
    shift, scale, gate = block.norm.linear(temb)[:, None].chunk(3, dim=-1)
    normed = block.norm.norm(hidden_states) * (1 + scale) + shift
    query, key = attn.norm_q(_heads(attn.to_q(normed))), attn.norm_k(_heads(attn.to_k(normed)))
    attended = _attend(query, key, _heads(attn.to_v(normed)), rotary, mask)
    mlp = block.act_mlp(block.proj_mlp(normed))
    return hidden_states + gate * block.proj_out(torch.cat([attended, mlp], dim=-1))


def _heads(projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
    # Written out: for so few tokens, backward takes a third of the time of `scaled_dot_product_attention`'s on a CPU.
    scores = _rotate(query, rotary) @ _rotate(key, rotary).transpose(-2, -1) / math.sqrt(HEAD_DIM)
    attended = (scores if mask is None else scores + mask).softmax(dim=-1) @ value
    return attended.transpose(1, 2).flatten(2)


def _rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary[0], rotary[1]
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
