"""The modules of FLUX.2: diffusers', with the first linear of each single block as four."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..diffusers_models import model_class
from .config import Flux2Config


def build(class_name: str, diffusers_config: Mapping[str, Any], config: Flux2Config) -> nn.Module:
    """Make the model; inside `torch.device("meta")` it costs no memory.

    `attn.to_qkv_mlp_proj` becomes `to_q`, `to_k`, `to_v` and `to_mlp`, its rows in that order: as many multiplications,
    and LoRAs, DoRA among them, for a part of it are those of a linear. Attention and the MLP read what is contiguous.
    """
    model = model_class(class_name)(**diffusers_config)
    hidden = config.hidden_size
    for block in model.single_transformer_blocks:
        del block.attn.to_qkv_mlp_proj
        for name, rows in (("to_q", hidden), ("to_k", hidden), ("to_v", hidden), ("to_mlp", 2 * config.mlp_dim)):
            setattr(block.attn, name, nn.Linear(hidden, rows, bias=False))
    return model
