"""Sizes and tensors that every such model has, whatever its blocks add."""

from __future__ import annotations

from collections.abc import Iterator

from ..layout import VectorWeight

HEAD_DIM = 128
# What timesteps and guidance are embedded in before the first linear.
TIMESTEP_DIM = 256


def canonical(name: str) -> str:
    """The layout's name of a tensor: ComfyUI saves the scales of RMS norms as `.weight`."""
    return f"{name.removesuffix('.weight')}.scale" if name.endswith("_norm.weight") else name


def diffusers_block(name: str) -> str:
    """The name of a block, or of what is in it, with diffusers' word for the block."""
    return name.replace("single_blocks", "single_transformer_blocks").replace("double_blocks", "transformer_blocks")


def double_norms(index: int) -> Iterator[VectorWeight]:
    """The scales of a double block's RMS norms."""
    old, new = f"double_blocks.{index}", f"transformer_blocks.{index}.attn"
    for stream, names in (("img", ("norm_q", "norm_k")), ("txt", ("norm_added_q", "norm_added_k"))):
        for kind, module in zip(("query", "key"), names, strict=True):
            yield VectorWeight(f"{old}.{stream}_attn.norm.{kind}_norm.scale", f"{new}.{module}.weight", HEAD_DIM)


def single_norms(index: int) -> Iterator[VectorWeight]:
    """The scales of a single block's RMS norms."""
    for kind, module in (("query", "norm_q"), ("key", "norm_k")):
        yield VectorWeight(
            f"single_blocks.{index}.norm.{kind}_norm.scale",
            f"single_transformer_blocks.{index}.attn.{module}.weight",
            HEAD_DIM,
        )
