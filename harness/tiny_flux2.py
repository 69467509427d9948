"""Small, seeded FLUX.2 models, which stock ComfyUI loads; see `tiny_models`, whose streams and gains they share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.families.flux2.layout import diffusers_layout
from accel.families.layout import swap_halves
from accel.spec import ModelSpec

from .tiny_models import HEAD_DIM, linear_gain, orthonormal, seeded_normal

# Channels of a token: ComfyUI's latent format fixes them.
CHANNELS = 128
# ComfyUI assumes this ratio of MLP width to hidden size.
MLP_RATIO = 3
# Of the shared modulations, which no bias keeps open. With more, all blocks add up to a model that turns rounding to
# bfloat16 into several percent of the picture, stock ComfyUI's as much as ours.
MODULATION_GAIN = 0.7
# How much of the noise that `img_in` embeds the velocity takes away.
READ_BACK = 1.0


@dataclass(frozen=True)
class TinyFlux2Config:
    """Shape of a FLUX.2 transformer.

    Args:
        hidden: Model width, a multiple of `HEAD_DIM`.
        depth: Number of double blocks.
        depth_single: Number of single blocks.
        context: Width of a text token.
        guidance: Whether the checkpoint has `guidance_in` (dev) or not (klein).
    """

    hidden: int = 256
    depth: int = 2
    depth_single: int = 2
    context: int = 768
    guidance: bool = False

    @property
    def mlp(self) -> int:
        """What the MLP's last linear reads."""
        return MLP_RATIO * self.hidden


def flux2_linears(config: TinyFlux2Config) -> dict[str, tuple[int, int]]:
    """Every linear of a FLUX.2 transformer under its BFL module name, as (out_features, in_features)."""
    hidden, mlp = config.hidden, config.mlp
    linears = {
        "img_in": (hidden, CHANNELS),
        "txt_in": (hidden, config.context),
        "time_in.in_layer": (hidden, 256),
        "time_in.out_layer": (hidden, hidden),
        "double_stream_modulation_img.lin": (6 * hidden, hidden),
        "double_stream_modulation_txt.lin": (6 * hidden, hidden),
        "single_stream_modulation.lin": (3 * hidden, hidden),
    }
    if config.guidance:
        linears |= {"guidance_in.in_layer": (hidden, 256), "guidance_in.out_layer": (hidden, hidden)}
    for index in range(config.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linears |= {
                f"{block}_attn.qkv": (3 * hidden, hidden),
                f"{block}_attn.proj": (hidden, hidden),
                f"{block}_mlp.0": (2 * mlp, hidden),
                f"{block}_mlp.2": (hidden, mlp),
            }
    for index in range(config.depth_single):
        linears |= {
            f"single_blocks.{index}.linear1": (3 * hidden + 2 * mlp, hidden),
            f"single_blocks.{index}.linear2": (hidden, hidden + mlp),
        }
    return linears | {
        "final_layer.linear": (CHANNELS, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }


def tiny_flux2_state_dict(config: TinyFlux2Config, seed: int = 0) -> dict[str, Tensor]:
    """Random FLUX.2 transformer in the original (BFL) key layout.

    As in `tiny_models.tiny_flux_state_dict` the final layer reads back what `img_in` embedded.

    Args:
        config: Sizes.
        seed: Same config and seed give the same values.
    Returns:
        Float32 CPU tensors; norm weights end in `_norm.scale` as in the published files.
    """
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in flux2_linears(config).items():
        gain = MODULATION_GAIN if "stream_modulation" in module else linear_gain(module)
        tensors[f"{module}.weight"] = seeded_normal(
            seed, f"{module}.weight", (out_features, in_features), gain / math.sqrt(in_features)
        )
    embed = orthonormal(seed, "img_in.orthonormal", config.hidden, CHANNELS)
    scale = math.sqrt(config.hidden / CHANNELS)
    tensors["img_in.weight"] = embed * scale
    tensors["final_layer.linear.weight"] += READ_BACK * embed.T / scale
    norms = [f"double_blocks.{i}.{stream}_attn.norm" for i in range(config.depth) for stream in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(config.depth_single)]
    for norm in norms:
        for part in ("query_norm", "key_norm"):
            name = f"{norm}.{part}.scale"
            tensors[name] = torch.full((HEAD_DIM,), 1.8) + seeded_normal(seed, name, (HEAD_DIM,), 0.1)
    return tensors


def as_diffusers(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the original layout as diffusers' own model has them."""
    names = {part.module: linear.name for linear in diffusers_layout(spec.config).linears for part in linear.parts}
    state = {vector.parameter: tensors[vector.name] for vector in spec.layout.vectors}
    for linear in spec.layout.linears:
        weight = tensors[f"{linear.name}.weight"]
        weight = swap_halves(weight) if linear.swap_halves else weight
        wholes = {names[part.module] for part in linear.parts}
        if len(wholes) < len(linear.parts):
            state[f"{wholes.pop()}.weight"] = weight
            continue
        for part in linear.parts:
            state[f"{part.module}.weight"] = weight[part.start : part.start + part.rows]
    return state
