"""FLUX.2 as benchmarks need it, see `base.BenchmarkFamily`."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.families.flux2 import CHANNELS, POSITIONS, Flux2, Flux2Config, Flux2Inputs
from accel.families.flux2.layout import diffusers_layout

from .base import Arguments, BenchmarkFamily, Make, Tokens

QUICK = Flux2Config(256, 2, 4, 768, 768, False)
# Shift, scale and gate, for attention and for the MLP; and once for both.
DOUBLE, SINGLE = 6, 3


def one_of_each(hidden_size: int) -> Flux2Config:
    """FLUX.2 of some width, with one double and one single block; the modulations around them are as wide as ever."""
    return Flux2Config(hidden_size, 1, 1, 256, 3 * hidden_size, False)


def _ours(config: Flux2Config, make: Make, rotary: Tensor) -> Arguments:
    hidden = config.hidden_size
    image, text, single = (make(1, 1, count * hidden) for count in (DOUBLE, DOUBLE, SINGLE))
    return Arguments((image, text, rotary, None, None), (single, rotary, None, None))


def _theirs(config: Flux2Config, make: Make, tokens: Tokens, rotary: tuple[Tensor, Tensor]) -> Arguments:
    """Text and image are joined before the first single block, as here."""
    hidden = config.hidden_size
    image, text, single = (make(1, count * hidden) for count in (DOUBLE, DOUBLE, SINGLE))
    return Arguments(
        (make(1, tokens.image, hidden), make(1, tokens.text, hidden), image, text, rotary),
        (make(1, tokens.all, hidden), None, single, rotary),
    )


def _forward_inputs(config: Flux2Config, make: Make, latent: int, text_tokens: int) -> Flux2Inputs:
    return Flux2Inputs(
        latent=make(1, CHANNELS, latent, latent),
        timestep=torch.tensor([0.7367]),
        encoder_hidden_states=make(1, text_tokens, config.context_dim),
        guidance=torch.tensor([3.5]) if config.guidance else None,
    )


FLUX2 = BenchmarkFamily(Flux2(), POSITIONS, QUICK, one_of_each, diffusers_layout, _ours, _theirs, _forward_inputs)
