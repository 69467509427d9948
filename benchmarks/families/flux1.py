"""FLUX.1 as benchmarks need it, see `base.BenchmarkFamily`."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.families.flux1 import POSITIONS, Flux1, Flux1Config, Flux1Inputs
from accel.families.layout import Layout

from .base import Arguments, BenchmarkFamily, Make, Tokens

DEV = Flux1.published["flux1-dev"]
QUICK = Flux1Config(256, 2, 4, 64, 64, 768, 768, 1024, True)
CHANNELS = 16


def one_of_each(hidden_size: int) -> Flux1Config:
    """FLUX.1 of some width, with one double and one single block, and nothing large around them."""
    return Flux1Config(hidden_size, 1, 1, 64, 64, 256, 256, 4 * hidden_size, True)


def _diffusers_layout(config: Flux1Config) -> Layout:
    return Flux1().layout(config).separate()


def _ours(config: Flux1Config, make: Make, rotary: Tensor) -> Arguments:
    behind = make(1, config.hidden_size), rotary, None
    return Arguments(behind, behind)


def _theirs(config: Flux1Config, make: Make, tokens: Tokens, rotary: tuple[Tensor, Tensor]) -> Arguments:
    """Text and image are joined and split inside each single block."""
    hidden = config.hidden_size
    both = make(1, tokens.image, hidden), make(1, tokens.text, hidden), make(1, hidden), rotary
    return Arguments(both, both)


def _forward_inputs(config: Flux1Config, make: Make, latent: int, text_tokens: int) -> Flux1Inputs:
    return Flux1Inputs(
        latent=make(1, CHANNELS, latent, latent),
        timestep=torch.tensor([0.7367]),
        encoder_hidden_states=make(1, text_tokens, config.context_dim),
        pooled_projections=make(1, config.pooled_dim),
        guidance=torch.tensor([3.5]),
    )


FLUX1 = BenchmarkFamily(Flux1(), POSITIONS, QUICK, one_of_each, _diffusers_layout, _ours, _theirs, _forward_inputs)
