"""One forward of FLUX.2: what `streams` leaves to the family.

Shapes: b batch, t text tokens, i image tokens (references included), h hidden size; m is 1, or 2 where reference tokens
are modulated as at timestep 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams.forward import Arguments, StreamForward, sinusoid
from ..streams.inputs import BlockState
from ..streams.positions import INDEX_TIMESTEP_ZERO, Positions
from .config import POSITIONS
from .inputs import Flux2Inputs


@dataclass(frozen=True)
class Conditioning:
    """What all blocks are conditioned with.

    Attributes:
        temb: ``b h``, the sum of what timestep and guidance are embedded as.
        image: ``b m (6 h)``, the modulation of image tokens in double blocks.
        text: ``b 1 (6 h)``, that of text tokens.
        single: ``b m (3 h)``, that of all tokens in single blocks.
        references: ``i`` bool, which image tokens the second of two modulations is for; None: m is 1.
    """

    temb: Tensor
    image: Tensor
    text: Tensor
    single: Tensor
    references: Tensor | None


class Flux2Forward(StreamForward):
    """Runs the modules of FLUX.2 block by block."""

    positions: ClassVar[Positions] = POSITIONS

    def _condition(self, inputs: Flux2Inputs, hidden_states: Tensor, image_tokens: int) -> Conditioning:
        model, dtype, count = self._model, hidden_states.dtype, 1
        references, timestep = None, inputs.timestep
        if inputs.references and inputs.reference_method == INDEX_TIMESTEP_ZERO:
            tokens = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            references, count = tokens >= image_tokens, 2
            timestep = torch.cat([timestep, 0 * timestep])
        embed = model.time_guidance_embed
        temb = embed.timestep_embedder(sinusoid(timestep).to(dtype))
        if self.config.guidance and inputs.guidance is not None:
            temb = temb + embed.guidance_embedder(sinusoid(inputs.guidance).to(dtype)).repeat(count, 1)
        each = temb.unflatten(0, (count, -1)).movedim(0, 1)
        activated = F.silu(each)
        return Conditioning(
            each[:, 0],
            model.double_stream_modulation_img.linear(activated),
            model.double_stream_modulation_txt.linear(activated[:, :1]),
            model.single_stream_modulation.linear(activated),
            references,
        )

    def _double_arguments(self, state: BlockState) -> Arguments:
        given = state.conditioning
        return (
            state.hidden_states,
            state.encoder_hidden_states,
            given.image,
            given.text,
            state.rotary,
            state.mask,
            given.references,
        )

    def _single_arguments(self, state: BlockState) -> Arguments:
        given, references = state.conditioning, state.conditioning.references
        if references is not None:
            references = F.pad(references, (state.text_tokens, 0))
        return state.hidden_states, given.single, state.rotary, state.mask, references

    def _whole_arguments(self, state: BlockState) -> Arguments:
        given = state.conditioning
        return (
            state.hidden_states,
            state.encoder_hidden_states,
            given.image,
            given.text,
            given.single,
            state.rotary,
            state.mask,
            given.references,
        )
