"""One forward of FLUX.1: what `streams` leaves to the family.

Shapes: b batch, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..streams.forward import Arguments, StreamForward, sinusoid
from ..streams.inputs import BlockState
from ..streams.positions import Positions
from .config import POSITIONS
from .inputs import Flux1Inputs


@dataclass(frozen=True)
class Conditioning:
    """What all blocks are conditioned with.

    Attributes:
        temb: ``b h``, the sum of what timestep, guidance and pooled text are embedded as.
        activated: ``b h``, SiLU of it, computed once for all blocks.
    """

    temb: Tensor
    activated: Tensor

    @classmethod
    def of(cls, temb: Tensor) -> Conditioning:
        """Activate it."""
        return cls(temb, F.silu(temb))


class Flux1Forward(StreamForward):
    """Runs a diffusers `FluxTransformer2DModel` block by block."""

    positions: ClassVar[Positions] = POSITIONS

    def _condition(self, inputs: Flux1Inputs, hidden_states: Tensor, image_tokens: int) -> Conditioning:
        embed, dtype = self._model.time_text_embed, hidden_states.dtype
        pooled = inputs.pooled_projections
        if pooled is None:
            pooled = inputs.latent.new_zeros(inputs.latent.shape[0], self.config.pooled_dim, dtype=dtype)
        temb = embed.timestep_embedder(sinusoid(inputs.timestep).to(dtype))
        if self.config.guidance and inputs.guidance is not None:
            temb = temb + embed.guidance_embedder(sinusoid(inputs.guidance).to(dtype))
        return Conditioning.of(temb + embed.text_embedder(pooled[:, : self.config.pooled_dim].to(dtype)))

    def _double_arguments(self, state: BlockState) -> Arguments:
        return (
            state.hidden_states,
            state.encoder_hidden_states,
            state.conditioning.activated,
            state.rotary,
            state.mask,
        )

    def _single_arguments(self, state: BlockState) -> Arguments:
        return state.hidden_states, state.conditioning.activated, state.rotary, state.mask

    def _whole_arguments(self, state: BlockState) -> Arguments:
        return self._double_arguments(state)
