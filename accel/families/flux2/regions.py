"""What is compiled of FLUX.2: one function for each kind of block, or one for all of them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ...attention import Attention
from ..base import Region
from .blocks import double_block, single_block


def block_regions(attention: Attention) -> tuple[Region, Region]:
    """The functions that run a double and a single block."""

    def double(block, hidden_states, encoder_hidden_states, image, text, rotary, mask, references):
        return double_block(
            block, hidden_states, encoder_hidden_states, image, text, rotary, mask, references, attention
        )

    def single(block, hidden_states, modulation, rotary, mask, references):
        return single_block(block, hidden_states, modulation, rotary, mask, references, attention)

    return double, single


def open_regions(attention: Attention) -> tuple[Region, Region]:
    """The same for blocks with something to be done inside their attention, see `streams.inside.InsideAttention`."""
    return functools.partial(double_block, attention=attention), functools.partial(single_block, attention=attention)


def whole_region(attention: Attention) -> Region:
    """The function that runs all blocks."""

    def whole(model, hidden_states, encoder_hidden_states, image, text, modulation, rotary, mask, references):
        text_tokens = encoder_hidden_states.shape[1]
        for block in model.transformer_blocks:
            hidden_states, encoder_hidden_states = double_block(
                block, hidden_states, encoder_hidden_states, image, text, rotary, mask, references, attention
            )
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if references is not None:
            references = F.pad(references, (text_tokens, 0))
        for block in model.single_transformer_blocks:
            hidden_states = single_block(block, hidden_states, modulation, rotary, mask, references, attention)
        return hidden_states

    return whole
