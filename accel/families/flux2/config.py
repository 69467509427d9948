"""Recognise a FLUX.2 checkpoint from its header, in the original or in diffusers' layout, and derive its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...files import TensorInfo
from ..streams.layout import HEAD_DIM
from ..streams.positions import INDEX, INDEX_TIMESTEP_ZERO, OFFSET, UXO, Positions
from ..streams.recognise import Header
from ..wording import KnownModels

PATCH_SIZE = 1
# Text tokens are counted along the last axis; references stand ten apart along the first.
# Source: black-forest-labs/flux2 sampling.py; comfy/model_detection.py.
POSITIONS = Positions(
    (32, 32, 32, 32), 2000.0, PATCH_SIZE, (INDEX, INDEX_TIMESTEP_ZERO, OFFSET, UXO), index_step=10.0, text_axis=3
)
# Of the latents of FLUX.2's autoencoder: 32 in each of 2 × 2 places.
CHANNELS = 128
MODELS_BY_CHANNELS = {CHANNELS: KnownModels("FLUX.2 dev or klein", True)}

# hidden size -> what is published in it. dev also has guidance, which klein lacks.
KLEIN = {3072: "klein 4B", 4096: "klein 9B"}
# hidden size -> double and single blocks of what is published in it; models that were pruned have fewer.
DEPTHS = {3072: (5, 20), 4096: (8, 24), 6144: (8, 48)}


@dataclass(frozen=True)
class Flux2Config:
    """The sizes of one FLUX.2 transformer.

    Attributes:
        context_dim: three layers of its text encoder, side by side.
        mlp_dim: what the MLP's last linear reads; the gate and its value are twice as wide.
        guidance: whether it is guidance-distilled (dev) or not (klein).
    """

    hidden_size: int
    depth: int
    depth_single: int
    context_dim: int
    mlp_dim: int
    guidance: bool

    @property
    def num_heads(self) -> int:
        """Attention heads of 128 each."""
        return self.hidden_size // HEAD_DIM

    @property
    def variant(self) -> str:
        """Name of the published model of these sizes; klein's distilled and base models have the same."""
        return "dev" if self.guidance else KLEIN.get(self.hidden_size, "klein")

    @property
    def sizes(self) -> str:
        """Blocks and width, for a report."""
        return f"{self.depth} double, {self.depth_single} single, hidden size {self.hidden_size}"


# Linears that no other model has: the family is told by them.
MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
# What embeds FLUX.1's pooled vector, which FLUX.2 has not, in either layout.
POOLED = ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")


@dataclass(frozen=True)
class Names:
    """What one layout calls the tensors that the sizes follow from.

    Attributes:
        modulation: the end of a shared modulation, see `MODULATIONS`.
        double: the double blocks, without their number; `single` likewise.
        mlp: a linear in the first double block, after its number; the others are whole names.
    """

    modulation: str
    double: str
    single: str
    mlp: str
    image: str
    text: str
    guidance: str
    out: str


# Source: black-forest-labs/flux2 model.py.
ORIGINAL = Names(
    modulation="lin",
    double="double_blocks",
    single="single_blocks",
    mlp="img_mlp.2",
    image="img_in",
    text="txt_in",
    guidance="guidance_in.in_layer",
    out="final_layer.linear",
)
# Source: diffusers models/transformers/transformer_flux2.py.
DIFFUSERS = Names(
    modulation="linear",
    double="transformer_blocks",
    single="single_transformer_blocks",
    mlp="ff.linear_out",
    image="x_embedder",
    text="context_embedder",
    guidance="time_guidance_embed.guidance_embedder.linear_1",
    out="proj_out",
)


def recognise(tensors: Mapping[str, TensorInfo], file_name: str, names: Names = ORIGINAL) -> Flux2Config | None:
    """Derive the configuration of a FLUX.2 checkpoint from its header.

    Args:
        tensors: header of a checkpoint.
        file_name: the file's name, for messages.
        names: the layout to look for.

    Returns:
        The configuration, or None when nothing in the header looks like FLUX.2 in this layout.

    Raises:
        CheckpointError: it looks like FLUX.2 but is damaged.
    """
    told = next((name for each in MODULATIONS if (name := f"{each}.{names.modulation}.weight") in tensors), None)
    if told is None:
        return None
    if (other := next((name for name in POOLED if name in tensors), None)) is not None:
        raise CheckpointError(
            f"'{file_name}' has '{told}', as FLUX.2 has, and '{other}', as FLUX.1 has. It is damaged, or mixed from "
            "two models: get one of them."
        )
    header = Header(tensors, file_name, "FLUX.2")
    depth, depth_single = header.count(names.double), header.count(names.single)
    hidden_size = header.hidden_size(names.image)
    for linear, channels in ((names.image, header.matrix(names.image)[1]), (names.out, header.matrix(names.out)[0])):
        if channels != CHANNELS:
            raise CheckpointError(
                f"'{file_name}': {linear} has {channels} channels, expected {CHANNELS}, as FLUX.2's latents have. It "
                "was made of FLUX.2 with inputs of its own, which this loader does not supply: load it with the nodes "
                "that its author names, or choose FLUX.2 dev or klein."
            )
    _, context_dim = header.matrix(names.text)
    _, mlp_dim = header.matrix(f"{names.double}.0.{names.mlp}")
    return Flux2Config(
        hidden_size=hidden_size,
        depth=depth,
        depth_single=depth_single,
        context_dim=context_dim,
        mlp_dim=mlp_dim,
        guidance=f"{names.guidance}.weight" in tensors,
    )
