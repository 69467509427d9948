"""The sizes of FLUX.2 as ComfyUI writes them, for its model without data; see `streams.skeleton`."""

from __future__ import annotations

from typing import Any

from ....accel.families.flux2 import CHANNELS, PATCH_SIZE, POSITIONS, Flux2, Flux2Config
from ..streams.skeleton import nameless


def unet_config(config: Flux2Config) -> dict[str, Any]:
    """The sizes of a model as ComfyUI's model detection writes them."""
    return {
        "image_model": "flux2",
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "vec_in_dim": None,
        "context_in_dim": config.context_dim,
        "hidden_size": config.hidden_size,
        "mlp_ratio": config.mlp_dim / config.hidden_size,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "depth_single_blocks": config.depth_single,
        "axes_dim": list(POSITIONS.axes_dim),
        "theta": int(POSITIONS.theta),
        "patch_size": PATCH_SIZE,
        "qkv_bias": False,
        "ops_bias": False,
        "global_modulation": True,
        "mlp_silu_act": True,
        "default_ref_method": POSITIONS.methods[0],
        "ref_index_scale": POSITIONS.index_step,
        "guidance_embed": config.guidance,
        "txt_ids_dims": [POSITIONS.text_axis],
        "yak_mlp": False,
        "txt_norm": False,
        "disable_unet_model_creation": True,
    }


def nameless_weights() -> list[str]:
    """See `streams.skeleton.nameless`."""
    width = sum(POSITIONS.axes_dim)
    config = Flux2Config(width, 1, 1, context_dim=width, mlp_dim=3 * width, guidance=True)
    return nameless(unet_config(config), Flux2().layout(config))
