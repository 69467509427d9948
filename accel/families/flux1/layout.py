"""The original FLUX.1 checkpoint, key by key, and the diffusers modules that its tensors become.

Source: black-forest-labs/flux model.py and modules/layers.py for the left side, diffusers' FluxTransformer2DModel for
the right one; the same correspondence as diffusers' `convert_flux_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..layout import FusedLinear, Layout, VectorWeight
from ..streams.layout import TIMESTEP_DIM, double_norms, single_norms
from .config import Flux1Config


def checkpoint_layout(config: Flux1Config) -> Layout:
    """Every tensor of a FLUX.1 checkpoint with these sizes."""
    linears = [*_embedders(config), *_final_layer(config)]
    vectors: list[VectorWeight] = []
    for index in range(config.depth):
        linears += _double_block(config, index)
        vectors += double_norms(index)
    for index in range(config.depth_single):
        linears += _single_block(config, index)
        vectors += single_norms(index)
    blocks = [f"transformer_blocks.{index}" for index in range(config.depth)]
    blocks += [f"single_transformer_blocks.{index}" for index in range(config.depth_single)]
    return Layout(tuple(linears), tuple(vectors), tuple(blocks))


def _embedders(config: Flux1Config) -> Iterator[FusedLinear]:
    hidden = config.hidden_size
    # Fill, Canny and Depth read the noisy latents first, as FLUX.1-dev does, and their pictures behind them.
    narrow = config.out_channels if config.in_channels > config.out_channels else 0
    yield FusedLinear.of("img_in", config.in_channels, ("x_embedder", hidden), narrow_in_features=narrow)
    yield FusedLinear.of("txt_in", config.context_dim, ("context_embedder", hidden))
    embedders = [("time_in", "timestep_embedder", TIMESTEP_DIM), ("vector_in", "text_embedder", config.pooled_dim)]
    if config.guidance:
        embedders.append(("guidance_in", "guidance_embedder", TIMESTEP_DIM))
    for original, module, in_features in embedders:
        module = f"time_text_embed.{module}"
        yield FusedLinear.of(f"{original}.in_layer", in_features, (f"{module}.linear_1", hidden), per_picture=True)
        yield FusedLinear.of(f"{original}.out_layer", hidden, (f"{module}.linear_2", hidden), per_picture=True)


def _final_layer(config: Flux1Config) -> Iterator[FusedLinear]:
    hidden = config.hidden_size
    yield FusedLinear.of("final_layer.linear", hidden, ("proj_out", config.out_channels))
    modulation = ("norm_out.linear", 2 * hidden)
    yield FusedLinear.of("final_layer.adaLN_modulation.1", hidden, modulation, swap_halves=True, per_picture=True)


def _double_block(config: Flux1Config, index: int) -> Iterator[FusedLinear]:
    hidden, mlp = config.hidden_size, config.mlp_dim
    old, new = f"double_blocks.{index}", f"transformer_blocks.{index}"
    streams = (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    )
    for stream, norm, qkv, out, feed_forward in streams:
        yield FusedLinear.of(f"{old}.{stream}_mod.lin", hidden, (f"{new}.{norm}.linear", 6 * hidden), per_picture=True)
        yield FusedLinear.of(f"{old}.{stream}_attn.qkv", hidden, *((f"{new}.attn.{module}", hidden) for module in qkv))
        yield FusedLinear.of(f"{old}.{stream}_attn.proj", hidden, (f"{new}.attn.{out}", hidden))
        yield FusedLinear.of(f"{old}.{stream}_mlp.0", hidden, (f"{new}.{feed_forward}.net.0.proj", mlp))
        yield FusedLinear.of(f"{old}.{stream}_mlp.2", mlp, (f"{new}.{feed_forward}.net.2", hidden))


def _single_block(config: Flux1Config, index: int) -> Iterator[FusedLinear]:
    hidden, mlp = config.hidden_size, config.mlp_dim
    old, new = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
    yield FusedLinear.of(f"{old}.modulation.lin", hidden, (f"{new}.norm.linear", 3 * hidden), per_picture=True)
    parts = [(f"{new}.attn.{module}", hidden) for module in ("to_q", "to_k", "to_v")]
    yield FusedLinear.of(f"{old}.linear1", hidden, *parts, (f"{new}.proj_mlp", mlp))
    yield FusedLinear.of(f"{old}.linear2", hidden + mlp, (f"{new}.proj_out", hidden))
