"""What the rest of `accel` asks of a model family, and the dataclasses that the answers are made of.

A family is a folder beside this module with a class that implements `Family`, and one line in `registry`. Everything
that can be derived from its `Layout` (which modules are in which block, what may be quantized, every shape) is derived
there, so a family says it once.

Reading a checkpoint's header asks for recognition, layout and wording alone. What registers operators or imports a
library, so what builds and runs the model, a family imports inside `build`, `regions`, `whole` and `forward`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with `default`; torch needs the package itself

from ..files import TensorInfo
from .layout import Layout, LoraTarget, VectorWeight
from .wording import KnownKeys, KnownModels, KnownNames, Wording

if TYPE_CHECKING:
    from ..attention import Attention

Region = Callable[..., Any]
"""A function that runs one kind of block, or all of them: what is compiled as one."""


class FamilyConfig(Protocol):
    """The sizes of one model, derived from its tensors. Frozen and hashable; its repr is part of the compile key."""

    @property
    def variant(self) -> str:
        """Name of the published model with these inputs, such as `dev`."""

    @property
    def sizes(self) -> str:
        """Blocks and width for a person, such as `19 double, 38 single, hidden size 3072`."""


Config = TypeVar("Config", bound=FamilyConfig, default=FamilyConfig)


@dataclass(frozen=True)
class LoraNames:
    """By which names LoRA files call a model's layers; without words before them, see `lora.read.names`.

    Attributes:
        linears: module name -> the linears that it means.
        norms: module name -> the norm's scale.
        absent: names of linears and norms that other models of the family have and this one lacks -> what to say of
            their keys.
    """

    linears: Mapping[str, LoraTarget]
    norms: Mapping[str, VectorWeight]
    absent: Mapping[str, str]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder that a family's prompts go through.

    Attributes:
        name: as a person knows it.
        bytes: how it is kept -> what its weights take; "none", as published, is always there.
    """

    name: str
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Autoencoder:
    """What turns latents into pictures.

    Attributes:
        bytes: what its weights take.
        decode_bytes_per_pixel: what ComfyUI asks for to decode one pixel.
    """

    bytes: int
    decode_bytes_per_pixel: int


@dataclass(frozen=True)
class Workspace:
    """What a quantized linear holds while it runs, beside its input, its stored weight and its output.

    Attributes:
        input_bytes: of each element of the input, which is rounded before it is multiplied; 0: it is read as it is.
            Compiled, nothing else is written for that; eager, two copies in float32 are.
        product_bytes: of each element of a product that is scaled before it is the output; 0: there is none.
        unpacks_weight: whether the weight is written out in the compute dtype.
    """

    input_bytes: int = 0
    product_bytes: int = 0
    unpacks_weight: bool = False


class BlockWeights(Protocol):
    """Brings the weights of blocks to where they compute."""

    def enter(self, block: int) -> None:
        """Before a block runs; counted as in `Layout.blocks`."""

    def leave(self, block: int) -> None:
        """After it was run, or has failed."""


class Forward(Protocol):
    """Runs a model block by block."""

    def __call__(self, inputs: Any, /) -> Tensor:
        """Predict: from the family's own dataclass of inputs to (B, C, h, w) in the transformer's dtype."""


class Family(Protocol[Config]):
    """A model family; implementations derive from it, and have no state.

    Attributes:
        name: as a person knows it, such as `FLUX.1`.
        wording: what messages say.
        diffusers_class: `_class_name` in the `config.json` of its diffusers folders.
        gguf_architecture: `general.architecture` in its GGUF files.
        relatives: names that other models' checkpoints have, whose other names are like this family's: a file with one
            of them is not this family's.
        lora_relatives: the same of LoRA keys.
        image_embedder: the diffusers module that reads the latents.
        models_by_channels: channels that an image embedder reads -> the published models whose embedder does.
        text_tokens: how many a usual prompt is.
        pixels_per_latent: along one side of a picture; `pixels_per_token` likewise.
        autoencoder: see there.
        published: name -> sizes of models that a plan can be asked for without a file.
    """

    def __init_subclass__(cls) -> None:
        """Refuse a family that lacks one of the attributes, where it is defined.

        Raises:
            TypeError: it does. Methods that it lacks Python refuses when the class is instantiated.
        """
        super().__init_subclass__()
        missing = [name for name in Family.__annotations__ if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"the family {cls.__name__} lacks {', '.join(missing)}: see the attributes of `Family`.")

    # What a checkpoint is.

    name: str
    wording: Wording
    diffusers_class: str
    gguf_architecture: str
    relatives: Sequence[KnownNames] = ()

    @abstractmethod
    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> tuple[Config, Layout] | None:
        """Derive the sizes of a checkpoint, in any stored layout, from its header.

        Args:
            tensors: every tensor by its name, without a prefix.
            file_name: for messages.

        Returns:
            The sizes and the layout that the file follows; None: nothing in it looks like this family.

        Raises:
            CheckpointError: it looks like this family, but is damaged or does not run here.
        """

    def canonical(self, name: str) -> str:
        """The layout's name of a tensor that some programs call otherwise."""
        return name

    @abstractmethod
    def diffusers_config(self, config: Config) -> Mapping[str, Any]:
        """What diffusers' `config.json` says of a model with these sizes."""

    # What it consists of.

    @abstractmethod
    def layout(self, config: Config) -> Layout:
        """Every tensor, as the original checkpoint has it, and the diffusers module that it becomes."""

    # What LoRAs call it, and which LoRAs are not for it.

    lora_relatives: Sequence[KnownKeys] = ()
    image_embedder: str
    models_by_channels: Mapping[int, KnownModels]

    @abstractmethod
    def lora_names(self, config: Config) -> LoraNames:
        """By which names LoRA files call its layers; thousands, so keep the answer."""

    # How it computes.

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """Make the model with diffusers' names; inside `torch.device("meta")` it costs no memory."""

    @abstractmethod
    def heads(self, config: Config) -> tuple[int, int]:
        """How many heads the attention has, and their width."""

    @abstractmethod
    def regions(self, attention: Attention) -> tuple[Region, ...]:
        """The functions that run each kind of block, to be compiled one by one."""

    @abstractmethod
    def whole(self, attention: Attention) -> Region:
        """The function that runs all blocks, to be compiled as one."""

    @abstractmethod
    def forward(
        self,
        config: Config,
        model: nn.Module,
        regions: Sequence[Region],
        attention: Attention,
        weights: BlockWeights | None = None,
    ) -> Forward:
        """Tie a model to what runs its blocks.

        Args:
            config: of the model.
            model: what `build` made, filled.
            regions: those of `regions`, in that order, compiled or not; behind them that of `whole`, if it is to be
                used.
            attention: what they call, for blocks that have to run uncompiled.
            weights: told of every block before and after it runs; None where all of them stay in their places.
        """

    # What it needs of a device, and around it.

    text_tokens: int
    pixels_per_latent: int
    pixels_per_token: int
    autoencoder: Autoencoder
    published: Mapping[str, Config]

    @abstractmethod
    def activation_bytes(
        self, config: Config, tokens: int, dtype: torch.dtype, workspace: Workspace, compiled: bool
    ) -> int:
        """The most that a forward holds at once, without weights, LoRAs and what the sampler keeps.

        Args:
            config: sizes of the model.
            tokens: text and image tokens, references included, times the batch.
            dtype: what it computes in.
            workspace: of the linears inside the blocks.
            compiled: whether the blocks are compiled.

        Returns:
            Bytes; the allocator's fragments and library workspaces are not in it.
        """

    @abstractmethod
    def text_encoders(self, config: Config) -> Sequence[TextEncoder]:
        """What encodes its prompts, the largest first."""
