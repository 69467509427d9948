"""Recognise a FLUX.1 checkpoint in the original layout from its header, and derive its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...files import TensorInfo

HEAD_DIM = 128
AXES_DIM = (16, 56, 56)
TIMESTEP_DIM = 256
PATCH_SIZE = 2

# What the image embedder reads: the latent alone, or with a mask and a masked image, or with a control image.
# Source: black-forest-labs/flux util.py, `in_channels` of each configuration.
VARIANT_BY_IN_CHANNELS = {64: "base", 128: "control", 384: "fill"}


@dataclass(frozen=True)
class Flux1Config:
    """The sizes of one FLUX.1 transformer.

    Attributes:
        in_channels: channels of a packed token that enters, 64 × (1 latent, plus what a variant concatenates).
        out_channels: channels of a packed token that leaves.
        guidance: whether it is guidance-distilled (dev) or not (schnell).
    """

    hidden_size: int
    depth: int
    depth_single: int
    in_channels: int
    out_channels: int
    context_dim: int
    pooled_dim: int
    mlp_dim: int
    guidance: bool

    @property
    def num_heads(self) -> int:
        """Attention heads of 128 each."""
        return self.hidden_size // HEAD_DIM

    @property
    def variant(self) -> str:
        """Name of the published variant with these inputs."""
        kind = VARIANT_BY_IN_CHANNELS[self.in_channels]
        if kind == "base":
            return "dev" if self.guidance else "schnell"
        return kind


def recognise(tensors: Mapping[str, TensorInfo], name: str) -> Flux1Config | None:
    """Derive the configuration of a FLUX.1 checkpoint from its header.

    Args:
        tensors: header of a checkpoint whose keys follow black-forest-labs/flux.
        name: the file's name, for messages.

    Returns:
        The configuration, or None when nothing in the header looks like FLUX.1.

    Raises:
        CheckpointError: it looks like FLUX.1 but is a relative or a damaged one.
    """
    depth = _count(tensors, r"double_blocks\.(\d+)\.", name)
    depth_single = _count(tensors, r"single_blocks\.(\d+)\.", name)
    if not depth and not depth_single:
        return None
    _refuse_relatives(tensors, name)
    hidden_size, in_channels = _matrix(tensors, "img_in.weight", name)
    _, context_dim = _matrix(tensors, "txt_in.weight", name)
    _, pooled_dim = _matrix(tensors, "vector_in.in_layer.weight", name)
    out_channels, _ = _matrix(tensors, "final_layer.linear.weight", name)
    mlp_dim, _ = _matrix(tensors, "double_blocks.0.img_mlp.0.weight", name)
    if hidden_size % HEAD_DIM:
        raise CheckpointError(
            f"'{name}': img_in.weight has {hidden_size} rows, expected a multiple of {HEAD_DIM} (FLUX.1 heads are "
            f"{HEAD_DIM} wide). This is not a FLUX.1 checkpoint."
        )
    if in_channels not in VARIANT_BY_IN_CHANNELS:
        raise CheckpointError(
            f"'{name}': img_in reads {in_channels} channels, expected one of "
            f"{', '.join(map(str, VARIANT_BY_IN_CHANNELS))} (dev/schnell, Canny/Depth, Fill)."
        )
    return Flux1Config(
        hidden_size=hidden_size,
        depth=depth,
        depth_single=depth_single,
        in_channels=in_channels,
        out_channels=out_channels,
        context_dim=context_dim,
        pooled_dim=pooled_dim,
        mlp_dim=mlp_dim,
        guidance="guidance_in.in_layer.weight" in tensors,
    )


def _count(tensors: Mapping[str, TensorInfo], pattern: str, name: str) -> int:
    found = {int(match.group(1)) for key in tensors if (match := re.match(pattern, key))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found)
    if missing:
        block = pattern.split("\\")[0]
        raise CheckpointError(
            f"'{name}': {block}.{missing[0]} is missing, though {block}.{max(found)} is there. The file is incomplete: "
            "get it again."
        )
    return len(found)


def _matrix(tensors: Mapping[str, TensorInfo], key: str, name: str) -> tuple[int, int]:
    info = tensors.get(key)
    if info is None:
        raise CheckpointError(
            f"'{name}': looks like FLUX.1, but '{key}' is missing. The file is incomplete, or another model's."
        )
    if len(info.shape) != 2:
        raise CheckpointError(f"'{name}': '{key}' has shape {info.shape}, expected a matrix.")
    return info.shape[0], info.shape[1]


def _refuse_relatives(tensors: Mapping[str, TensorInfo], name: str) -> None:
    relatives = {
        "double_stream_modulation_img.lin.weight": "FLUX.2",
        "distilled_guidance_layer.in_proj.weight": "Chroma",
        "distilled_guidance_layer.layers.0.in_layer.weight": "Chroma",
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight": "HunyuanVideo",
    }
    for key, model in relatives.items():
        if key in tensors:
            raise CheckpointError(
                f"'{name}' is a {model} checkpoint; this pack runs FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, "
                f"Depth). Load it with ComfyUI's own Load Diffusion Model."
            )
