"""The sizes of FLUX.1 as ComfyUI writes them, for its model without data; see `streams.skeleton`."""

from __future__ import annotations

from typing import Any

from ....accel.families.flux1 import PATCH_SIZE, POSITIONS, Flux1, Flux1Config
from ..streams.skeleton import nameless


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


def nameless_weights() -> list[str]:
    """See `streams.skeleton.nameless`."""
    width = sum(POSITIONS.axes_dim)
    config = Flux1Config(
        hidden_size=width, depth=1, depth_single=1, in_channels=64, out_channels=64, context_dim=width,
        pooled_dim=width, mlp_dim=4 * width, guidance=True,
    )  # fmt: skip
    return nameless(unet_config(config), Flux1().layout(config))
