"""Recognise a FLUX.1 checkpoint from its header, in the original or in diffusers' layout, and derive its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...files import TensorInfo
from ..streams.layout import HEAD_DIM
from ..streams.positions import INDEX, OFFSET, UXO, Positions
from ..streams.recognise import Header
from ..wording import KnownModels

PATCH_SIZE = 2
POSITIONS = Positions((16, 56, 56), 10000.0, PATCH_SIZE, (OFFSET, INDEX, UXO))

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
    header, name = Header(tensors, file_name, "FLUX.1"), file_name
    depth, depth_single = header.count(names.double), header.count(names.single)
    # SD3, Qwen-Image and others have "transformer_blocks" too.
    if not depth_single and (names is DIFFUSERS or not depth):
        return None
    _, in_channels = header.matrix(names.image)
    _, context_dim = header.matrix(names.text)
    _, pooled_dim = header.matrix(names.pooled)
    out_channels, _ = header.matrix(names.out)
    mlp_dim, _ = header.matrix(f"{names.double}.0.{names.mlp}")
    hidden_size = header.hidden_size(names.image)
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
