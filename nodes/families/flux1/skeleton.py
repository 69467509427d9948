"""ComfyUI's own FLUX.1 model without data: its names and shapes, by which other nodes match LoRAs and read sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.ldm.flux.model
import torch
from torch import nn

from ....accel.families.flux1 import PATCH_SIZE, POSITIONS, Flux1, Flux1Config
from ...operations import EagerOperations


def unet_config(config: Flux1Config) -> dict[str, Any]:
    """The sizes of a model as ComfyUI's model detection writes them."""
    return {
        "image_model": "flux",
        "in_channels": config.in_channels // PATCH_SIZE**2,
        "out_channels": config.out_channels // PATCH_SIZE**2,
        "vec_in_dim": config.pooled_dim,
        "context_in_dim": config.context_dim,
        "hidden_size": config.hidden_size,
        "mlp_ratio": config.mlp_dim / config.hidden_size,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "depth_single_blocks": config.depth_single,
        "axes_dim": list(POSITIONS.axes_dim),
        "theta": int(POSITIONS.theta),
        "patch_size": PATCH_SIZE,
        "qkv_bias": True,
        "guidance_embed": config.guidance,
        "txt_ids_dims": [],
        "disable_unet_model_creation": True,
    }


def make_skeleton(sizes: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """ComfyUI's model of these sizes, see `unet_config`, on the meta device."""
    # Versions of ComfyUI differ in the fields that they know.
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    params = {name: value for name, value in sizes.items() if name in known}
    return comfy.ldm.flux.model.Flux(
        **params, dtype=dtype, device="meta", operations=EagerOperations
    ).requires_grad_(False)


def nameless_weights() -> list[str]:
    """Weights of a small model's linears that its skeleton lacks: LoRAs for them would find no place."""
    width = sum(POSITIONS.axes_dim)
    config = Flux1Config(
        hidden_size=width, depth=1, depth_single=1, in_channels=64, out_channels=64, context_dim=width,
        pooled_dim=width, mlp_dim=4 * width, guidance=True,
    )  # fmt: skip
    names = make_skeleton(unet_config(config), torch.float32).state_dict()
    return [name for linear in Flux1().layout(config).linears if (name := f"{linear.name}.weight") not in names]
