"""Pocket FLUX.2's transformer: sizes, and its blocks over modules that PEFT can wrap.

Its heads do not read where a text token stands. So all the padding behind a prompt, which FLUX.2 attends to, stays one
and the same vector through all blocks, and training computes it once, see `padding`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from accel.families.flux2 import POSITIONS, Flux2, Flux2Config, Flux2Inputs
from accel.families.flux2.forward import Flux2Forward

from ..model import Transformer, attend, heads, joint
from .text import TAKEN, WIDTH


def _double(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    image_modulation: Tensor,
    text_modulation: Tensor,
    rotary: Tensor,
    mask: Tensor | None,
    references: None,
) -> tuple[Tensor, Tensor]:
    """A double block as `accel.families.flux2.blocks.double_block` computes it; there is one modulation for all."""
    attn = block.attn
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = image_modulation.chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = text_modulation.chunk(6, dim=-1)
    image = block.norm1(hidden_states) * (1 + scale) + shift
    text = block.norm1_context(encoder_hidden_states) * (1 + c_scale) + c_shift
    attended = joint(attn, image, text, rotary, mask)
    tokens = encoder_hidden_states.shape[1]
    hidden_states = hidden_states + gate * attn.to_out[0](attended[:, tokens:])
    hidden_states = hidden_states + gate_mlp * block.ff(block.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp)
    encoder_hidden_states = encoder_hidden_states + c_gate * attn.to_add_out(attended[:, :tokens])
    text = block.norm2_context(encoder_hidden_states) * (1 + c_scale_mlp) + c_shift_mlp
    return hidden_states, encoder_hidden_states + c_gate_mlp * block.ff_context(text)


def _single(
    block: nn.Module, hidden_states: Tensor, modulation: Tensor, rotary: Tensor, mask: Tensor | None, references: None
) -> Tensor:
    """A single block, likewise."""
    attn = block.attn
    shift, scale, gate = modulation.chunk(3, dim=-1)
    normed = block.norm(hidden_states) * (1 + scale) + shift
    query, key = attn.norm_q(heads(attn.to_q(normed))), attn.norm_k(heads(attn.to_k(normed)))
    attended = attend(query, key, heads(attn.to_v(normed)), rotary, mask)
    gated, value = attn.to_mlp(normed).chunk(2, dim=-1)
    return hidden_states + gate * attn.to_out(torch.cat([attended, silu(gated) * value], dim=-1))


def _ignore_text_positions(model: nn.Module) -> None:
    """Keep the channels that turn with a text token's place out of every score.

    Once the scales of queries and of keys are both zero there, their gradients are too.
    """
    first = sum(POSITIONS.axes_dim[: POSITIONS.text_axis])
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            parameter[first : first + POSITIONS.axes_dim[POSITIONS.text_axis]] = 0.0


TRANSFORMER = Transformer(
    family=Flux2(),
    config=Flux2Config(
        hidden_size=128,
        depth=1,
        depth_single=4,
        context_dim=len(TAKEN) * WIDTH,
        mlp_dim=384,
        guidance=False,
    ),
    inputs=Flux2Inputs,
    forward=Flux2Forward,
    double=_double,
    single=_single,
    zero=("_modulation_img.linear.weight", "_modulation_txt.linear.weight", "_stream_modulation.linear.weight"),
    prepare=_ignore_text_positions,
)
