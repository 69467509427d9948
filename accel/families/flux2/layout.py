"""The original FLUX.2 checkpoint, key by key, and the modules that its tensors become.

Source: black-forest-labs/flux2 model.py for the left side, diffusers' Flux2Transformer2DModel for the right one. The
first linear of a single block is four modules here, see `model.build`; diffusers keeps it whole, as checkpoints do.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..layout import FusedLinear, Layout, VectorWeight
from ..streams.layout import TIMESTEP_DIM, double_norms, single_norms
from .config import CHANNELS, Flux2Config


def checkpoint_layout(config: Flux2Config) -> Layout:
    """Every tensor of a FLUX.2 checkpoint with these sizes."""
    linears = [*_embedders(config), *_modulations(config), *_final_layer(config)]
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


def diffusers_layout(config: Flux2Config) -> Layout:
    """The same as diffusers saves it."""
    fused = {
        f"single_blocks.{index}.linear1": f"single_transformer_blocks.{index}.attn.to_qkv_mlp_proj"
        for index in range(config.depth_single)
    }
    return checkpoint_layout(config).separate(fused)


def _embedders(config: Flux2Config) -> Iterator[FusedLinear]:
    hidden = config.hidden_size
    yield _linear("img_in", CHANNELS, "x_embedder", hidden)
    yield _linear("txt_in", config.context_dim, "context_embedder", hidden)
    embedders = [("time_in", "timestep_embedder")] + [("guidance_in", "guidance_embedder")] * config.guidance
    for original, module in embedders:
        module = f"time_guidance_embed.{module}"
        yield _linear(f"{original}.in_layer", TIMESTEP_DIM, f"{module}.linear_1", hidden, per_picture=True)
        yield _linear(f"{original}.out_layer", hidden, f"{module}.linear_2", hidden, per_picture=True)


def _modulations(config: Flux2Config) -> Iterator[FusedLinear]:
    hidden = config.hidden_size
    names = (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6), ("single_stream_modulation", 3))
    for name, count in names:
        yield _linear(f"{name}.lin", hidden, f"{name}.linear", count * hidden, per_picture=True)


def _final_layer(config: Flux2Config) -> Iterator[FusedLinear]:
    hidden = config.hidden_size
    yield _linear("final_layer.linear", hidden, "proj_out", CHANNELS)
    name = "final_layer.adaLN_modulation.1"
    yield _linear(name, hidden, "norm_out.linear", 2 * hidden, swap_halves=True, per_picture=True)


def _double_block(config: Flux2Config, index: int) -> Iterator[FusedLinear]:
    hidden, mlp = config.hidden_size, config.mlp_dim
    old, new = f"double_blocks.{index}", f"transformer_blocks.{index}"
    streams = (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    )
    for stream, qkv, out, feed_forward in streams:
        parts = [(f"{new}.attn.{module}", hidden) for module in qkv]
        yield FusedLinear.of(f"{old}.{stream}_attn.qkv", hidden, *parts, bias=False)
        yield _linear(f"{old}.{stream}_attn.proj", hidden, f"{new}.attn.{out}", hidden)
        yield _linear(f"{old}.{stream}_mlp.0", hidden, f"{new}.{feed_forward}.linear_in", 2 * mlp)
        yield _linear(f"{old}.{stream}_mlp.2", mlp, f"{new}.{feed_forward}.linear_out", hidden)


def _single_block(config: Flux2Config, index: int) -> Iterator[FusedLinear]:
    hidden, mlp = config.hidden_size, config.mlp_dim
    old, new = f"single_blocks.{index}", f"single_transformer_blocks.{index}.attn"
    parts = [(f"{new}.{module}", hidden) for module in ("to_q", "to_k", "to_v")]
    yield FusedLinear.of(f"{old}.linear1", hidden, *parts, (f"{new}.to_mlp", 2 * mlp), bias=False)
    yield _linear(f"{old}.linear2", hidden + mlp, f"{new}.to_out", hidden)


def _linear(name: str, in_features: int, module: str, rows: int, **options: bool) -> FusedLinear:
    """A linear of one part; none in FLUX.2 has a bias."""
    return FusedLinear.of(name, in_features, (module, rows), bias=False, **options)
