"""Tiny FLUX.1 ControlNets with random weights that stock ComfyUI loads."""

import torch
from torch import Tensor

from .lora_formats import DIFFUSERS_LISTS, FORMATS
from .tiny_models import TinyFluxConfig, flux_linears, linear_gain, seeded_normal, tiny_flux_state_dict

_NORMS = {
    "img_attn.norm.query_norm": "norm_q", "img_attn.norm.key_norm": "norm_k",
    "txt_attn.norm.query_norm": "norm_added_q", "txt_attn.norm.key_norm": "norm_added_k",
    "norm.query_norm": "norm_q", "norm.key_norm": "norm_k",
}


def xlabs_controlnet(config: TinyFluxConfig = TinyFluxConfig(), seed: int = 5) -> dict[str, Tensor]:
    """ControlNet in XLabs' layout (BFL names), which reads an image; it adds to double and single blocks.

    Args:
        config: of the model that it steers; the ControlNet has as many blocks.
        seed: Same seed, same values.
    Returns:
        Float32 CPU tensors.
    """
    tensors = {name: t for name, t in tiny_flux_state_dict(config, seed).items() if not name.startswith("final_layer.")}
    tensors |= _outputs(config, seed)
    tensors |= _linear("pos_embed_input", (config.hidden, config.in_channels), seed)
    channels = 3
    for index in range(0, 15, 2):
        tensors |= {
            f"input_hint_block.{index}.weight": seeded_normal(seed, f"hint.{index}", (16, channels, 3, 3), 0.3),
            f"input_hint_block.{index}.bias": seeded_normal(seed, f"hint.{index}.bias", (16,), 0.1),
        }
        channels = 16
    return tensors


def instantx_controlnet(config: TinyFluxConfig = TinyFluxConfig(), seed: int = 6) -> dict[str, Tensor]:
    """ControlNet in InstantX's layout (diffusers names), which reads a latent: ComfyUI encodes its image with a VAE.

    Args:
        config: As in `xlabs_controlnet`.
        seed: Same seed, same values.
    Returns:
        Float32 CPU tensors.
    """
    original = tiny_flux_state_dict(config, seed)
    tensors = {}
    for module in flux_linears(config):
        if module.startswith("final_layer."):
            continue
        for part in FORMATS["diffusers"].parts(module, config):
            for kind in ("weight", "bias"):
                rows = [original[f"{module}.{kind}"][start:stop] for start, stop in part.rows]
                tensors[f"{part.prefix.removeprefix('transformer.')}.{kind}"] = torch.cat(rows)
    for name, tensor in original.items():
        if name.endswith("_norm.scale"):
            family, index, norm = name.removesuffix(".scale").split(".", 2)
            tensors[f"{DIFFUSERS_LISTS[family]}.{index}.attn.{_NORMS[norm]}.weight"] = tensor
    tensors |= _linear("controlnet_x_embedder", (config.hidden, config.in_channels), seed)
    return tensors | _outputs(config, seed)


def _outputs(config: TinyFluxConfig, seed: int) -> dict[str, Tensor]:
    """One linear after each block; with a gain that changes a picture without drowning it."""
    tensors: dict[str, Tensor] = {}
    for kind, depth in (("controlnet_blocks", config.depth), ("controlnet_single_blocks", config.depth_single)):
        for index in range(depth):
            tensors |= _linear(f"{kind}.{index}", (config.hidden, config.hidden), seed, gain=0.3)
    return tensors


def _linear(name: str, shape: tuple[int, int], seed: int, gain: float | None = None) -> dict[str, Tensor]:
    std = (linear_gain(name) if gain is None else gain) / shape[1] ** 0.5
    return {
        f"{name}.weight": seeded_normal(seed, f"{name}.weight", shape, std),
        f"{name}.bias": seeded_normal(seed, f"{name}.bias", shape[:1], 0.1),
    }
