"""Recognise a FLUX.1 checkpoint from its header, in the original or in diffusers' layout, and derive its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...files import TensorInfo
from ..wording import KnownModels

HEAD_DIM = 128
AXES_DIM = (16, 56, 56)
TIMESTEP_DIM = 256
PATCH_SIZE = 2

# Double and single blocks of every FLUX.1 by Black Forest Labs; models that were pruned have fewer.
DEPTH, DEPTH_SINGLE = 19, 38

# What the image embedder reads: the latent alone, or with a mask and a masked image, or with a control image.
# Source: black-forest-labs/flux util.py, `in_channels` of each configuration.
VARIANT_BY_IN_CHANNELS = {64: "base", 128: "control", 384: "fill"}
# The same as a person knows these models; and models made of FLUX.1 whose further inputs nothing here supplies.
# Source: ostris/Flex.2-preview; ali-vilab/ACE_plus (the fine-tuned model, not its LoRAs).
MODELS_BY_CHANNELS = {
    64: KnownModels("FLUX.1 dev, schnell, Krea or Kontext", True),
    128: KnownModels("FLUX.1 Canny or Depth", True),
    384: KnownModels("FLUX.1 Fill", True),
    196: KnownModels("Flex.2-preview (a mask, a picture to fill and a control picture beside the latent)", False),
    448: KnownModels("ACE++ FFT (one more picture than FLUX.1 Fill)", False),
}


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

    @property
    def sizes(self) -> str:
        """Blocks and width, for a report."""
        return f"{self.depth} double, {self.depth_single} single, hidden size {self.hidden_size}"


@dataclass(frozen=True)
class Names:
    """What one layout calls the tensors that the sizes follow from.

    Attributes:
        double: the double blocks, without their number; `single` likewise.
        mlp: a linear in the first double block, after its number; the others are whole names.
    """

    double: str
    single: str
    mlp: str
    image: str
    text: str
    pooled: str
    guidance: str
    out: str


# Source: black-forest-labs/flux model.py.
ORIGINAL = Names(
    double="double_blocks",
    single="single_blocks",
    mlp="img_mlp.0",
    image="img_in",
    text="txt_in",
    pooled="vector_in.in_layer",
    guidance="guidance_in.in_layer",
    out="final_layer.linear",
)
# Source: diffusers models/transformers/transformer_flux.py.
DIFFUSERS = Names(
    double="transformer_blocks",
    single="single_transformer_blocks",
    mlp="ff.net.0.proj",
    image="x_embedder",
    text="context_embedder",
    pooled="time_text_embed.text_embedder.linear_1",
    guidance="time_text_embed.guidance_embedder.linear_1",
    out="proj_out",
)


def recognise(tensors: Mapping[str, TensorInfo], file_name: str, names: Names = ORIGINAL) -> Flux1Config | None:
    """Derive the configuration of a FLUX.1 checkpoint from its header.

    Args:
        tensors: header of a checkpoint.
        file_name: the file's name, for messages.
        names: the layout to look for.

    Returns:
        The configuration, or None when nothing in the header looks like FLUX.1 in this layout.

    Raises:
        CheckpointError: it looks like FLUX.1 but is damaged.
    """
    name = file_name
    depth = _count(tensors, names.double, name)
    depth_single = _count(tensors, names.single, name)
    # SD3, Qwen-Image and others have "transformer_blocks" too.
    if not depth_single and (names is DIFFUSERS or not depth):
        return None
    hidden_size, in_channels = _matrix(tensors, names.image, name)
    _, context_dim = _matrix(tensors, names.text, name)
    _, pooled_dim = _matrix(tensors, names.pooled, name)
    out_channels, _ = _matrix(tensors, names.out, name)
    mlp_dim, _ = _matrix(tensors, f"{names.double}.0.{names.mlp}", name)
    if hidden_size % HEAD_DIM:
        raise CheckpointError(
            f"'{name}': {names.image}.weight has {hidden_size} rows, expected a multiple of {HEAD_DIM} (FLUX.1 heads "
            f"are {HEAD_DIM} wide). This is not a FLUX.1 checkpoint: choose another file."
        )
    if in_channels not in VARIANT_BY_IN_CHANNELS:
        known = ", ".join(f"{channels} ({MODELS_BY_CHANNELS[channels].names})" for channels in VARIANT_BY_IN_CHANNELS)
        other = MODELS_BY_CHANNELS.get(in_channels)
        found = "no published FLUX.1 does" if other is None else other.names
        raise CheckpointError(
            f"'{name}': {names.image} reads {in_channels} channels, as {found}; expected {known}. It was made of "
            "FLUX.1 with inputs of its own, which this loader does not supply: load it with the nodes that its author "
            "names, or choose one of the models above."
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
        guidance=f"{names.guidance}.weight" in tensors,
    )


def _count(tensors: Mapping[str, TensorInfo], block: str, name: str) -> int:
    pattern = re.compile(rf"{block}\.(\d+)\.")
    found = {int(match.group(1)) for key in tensors if (match := pattern.match(key))}
    last = max(found, default=-1)
    # Not a range up to `last`: a damaged name may hold a number of any size.
    missing = next((index for index in range(len(found)) if index not in found), None)
    if missing is not None:
        raise CheckpointError(
            f"'{name}': {block}.{missing} is missing, though {block}.{last} is there. The file is incomplete: "
            "get it again."
        )
    return len(found)


def _matrix(tensors: Mapping[str, TensorInfo], linear: str, name: str) -> tuple[int, int]:
    key = f"{linear}.weight"
    info = tensors.get(key)
    if info is None:
        raise CheckpointError(
            f"'{name}': looks like FLUX.1, but '{key}' is missing. The file is incomplete, or another model's: get the "
            "complete transformer."
        )
    if len(info.shape) != 2:
        raise CheckpointError(
            f"'{name}': '{key}' has shape {info.shape}, expected a matrix. It is damaged, or packed in a format that "
            "the file does not name: choose the bf16, fp8 or GGUF file."
        )
    return info.shape[0], info.shape[1]
