"""A transformer while it is trained: diffusers' modules in this pack's forward, its file, its sampler.

What differs between families stands in a `Transformer`; their blocks are plain functions over modules that PEFT can
wrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accel.families.base import Family
from accel.families.layout import Layout
from accel.families.streams.forward import Regions, StreamForward
from accel.families.streams.inputs import StreamInputs
from accel.families.streams.layout import HEAD_DIM


@dataclass(frozen=True)
class Transformer:
    """What is trained.

    Attributes:
        family: of this pack.
        config: the family's, with the sizes.
        inputs: the family's.
        forward: the family's.
        double: a double block, with the family's arguments but for the attention backend.
        single: likewise.
        zero: ends of names of parameters that begin at zero, so that every block does nothing at first.
        prepare: called with a new model.
    """

    family: Family[Any]
    config: Any
    inputs: type[StreamInputs]
    forward: type[StreamForward]
    double: Callable[..., tuple[Tensor, Tensor]]
    single: Callable[..., Tensor]
    zero: tuple[str, ...]
    prepare: Callable[[nn.Module], None] = lambda model: None

    @property
    def layout(self) -> Layout:
        """Of the file."""
        return self.family.layout(self.config)


def build(kind: Transformer, seed: int) -> nn.Module:
    """A new transformer."""
    torch.manual_seed(seed)
    model = kind.family.build(kind.config).float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(kind.zero):
                parameter.zero_()
        for layer in (model.norm_out.linear, model.proj_out):
            layer.weight.zero_()
        kind.prepare(model)
    return model


def forward(
    kind: Transformer,
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    bias: Tensor | None,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """The velocity, shaped as the latents.

    Args:
        kind: what the model is.
        model: from `build`, with or without PEFT's layers.
        latents: (B, C, h, w).
        timestep: (B,), 1 is noise.
        text: (B, S, width).
        bias: see `padding.attention_bias`, or None.
        references: latents of pictures to edit, each (B, C, h, w).
    """
    inputs = kind.inputs(latents, timestep, text, attention_mask=bias, references=references)
    regions = Regions(kind.double, kind.single, None, kind.double, kind.single)
    return kind.forward(kind.config, model, regions)(inputs)


def sample(
    kind: Transformer,
    model: nn.Module,
    noise: Tensor,
    text: Tensor,
    bias: Tensor | None,
    sigmas: Tensor,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Latents from noise (B, C, h, w) by Euler's method; as ComfyUI's `euler` with these sigmas."""
    latents = noise
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            velocity = forward(kind, model, latents, now.expand(len(noise)), text, bias, references)
            latents = latents + (after - now) * velocity
    return latents


def checkpoint(kind: Transformer, model: nn.Module) -> dict[str, Tensor]:
    """The file: bfloat16, in the layout of black-forest-labs."""
    return {name: value.bfloat16().contiguous() for name, value in _original(kind.layout, model.state_dict())}


def load(kind: Transformer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo `checkpoint`, in place."""
    layout = kind.layout
    state = {}
    for linear in layout.linears:
        for end in _parameters(linear.bias):
            value = tensors[f"{linear.name}.{end}"]
            value = torch.cat(value.chunk(2)[::-1]) if linear.swap_halves else value
            for part in linear.parts:
                state[f"{part.module}.{end}"] = value[part.start : part.start + part.rows]
    state |= {vector.parameter: tensors[vector.name] for vector in layout.vectors}
    model.load_state_dict(state)


def heads(projected: Tensor) -> Tensor:
    """(B, N, heads * 128) -> (B, heads, N, 128)."""
    return projected.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with rotary positions, heads side by side: (B, heads, N, 128) -> (B, N, heads * 128)."""
    # Written out: for so few tokens, backward takes a third of the time of `scaled_dot_product_attention`'s on a CPU.
    scores = _rotate(query, rotary) @ _rotate(key, rotary).transpose(-2, -1) / math.sqrt(HEAD_DIM)
    attended = (scores if mask is None else scores + mask).softmax(dim=-1) @ value
    return attended.transpose(1, 2).flatten(2)


def joint(attn: nn.Module, image: Tensor, text: Tensor, rotary: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a double block over both streams, text first, (B, S + N, heads * 128)."""
    query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))], dim=2)
    key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), attn.norm_k(heads(attn.to_k(image)))], dim=2)
    value = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], dim=2)
    return attend(query, key, value, rotary, mask)


def _original(layout: Layout, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for linear in layout.linears:
        for end in _parameters(linear.bias):
            value = torch.cat([state[f"{part.module}.{end}"] for part in linear.parts])
            yield f"{linear.name}.{end}", torch.cat(value.chunk(2)[::-1]) if linear.swap_halves else value
    for vector in layout.vectors:
        yield vector.name, state[vector.parameter]


def _parameters(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _rotate(heads: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary[0], rotary[1]
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
