"""FLUX.1: dev, schnell, Krea, Kontext, Fill, Canny, Depth, and models of other sizes with the same architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...attention import Attention
from ...files import TensorInfo
from ...lora.read.names import ModuleNames
from ..diffusers_models import model_class
from ..layout import Layout, LoraTarget, VectorWeight
from . import blocks
from .activations import activation_bytes, image_tokens
from .config import AXES_DIM, DIFFUSERS, HEAD_DIM, INPUTS, PATCH_SIZE, VARIANT_BY_IN_CHANNELS, Flux1Config
from .config import recognise as recognise_config
from .forward import BlockWeights, Flux1Forward
from .inputs import Flux1Inputs
from .layout import checkpoint_layout
from .lora_names import lora_absent, lora_linears, lora_norms

__all__ = ["AXES_DIM", "PATCH_SIZE", "Flux1", "Flux1Config", "Flux1Inputs"]


class Flux1:
    """What the rest of `accel` needs to know about FLUX.1."""

    name = "FLUX.1"

    diffusers_class = "FluxTransformer2DModel"

    gguf_architecture = "flux"

    image_embedder = "x_embedder"

    def recognise(self, tensors: Mapping[str, TensorInfo], file_name: str) -> tuple[Flux1Config, Layout] | None:
        """The configuration of a checkpoint and the layout that it follows; see `config.recognise`."""
        config = recognise_config(tensors, file_name)
        if config is not None:
            return config, checkpoint_layout(config)
        config = recognise_config(tensors, file_name, DIFFUSERS)
        return None if config is None else (config, checkpoint_layout(config).separate())

    def canonical(self, name: str) -> str:
        """The layout's name of a tensor: ComfyUI saves the scales of RMS norms as `.weight`."""
        return f"{name.removesuffix('.weight')}.scale" if name.endswith("_norm.weight") else name

    def layout(self, config: Flux1Config) -> Layout:
        """See `layout.checkpoint_layout`."""
        return checkpoint_layout(config)

    def lora_linears(self, config: Flux1Config) -> ModuleNames[LoraTarget]:
        """See `lora_names.lora_linears`."""
        return _lora_names(config)[0]

    def lora_norms(self, config: Flux1Config) -> ModuleNames[VectorWeight]:
        """See `lora_names.lora_norms`."""
        return _lora_names(config)[1]

    def lora_absent(self, config: Flux1Config) -> ModuleNames[str]:
        """See `lora_names.lora_absent`."""
        return _absent_names(config)

    def inputs(self, channels: int) -> tuple[str, bool] | None:
        """What published models read so many channels per token, and whether they run here; None: none does."""
        return (INPUTS[channels], channels in VARIANT_BY_IN_CHANNELS) if channels in INPUTS else None

    def quantizable(self, module: str) -> bool:
        """Whether a linear of the diffusers model may be stored in fewer bits: those inside the blocks.

        The embedders, the norms and the final layer stay. They are 0.5 % of FLUX.1's weights, so there is nothing to
        gain; but every token, every block's conditioning and every pixel pass through them once, unaveraged.
        """
        return module.startswith(("transformer_blocks.", "single_transformer_blocks."))

    def per_picture(self, module: str) -> bool:
        """Whether a linear of a block runs once per picture, not on every token: the modulations."""
        return self.quantizable(module) and module.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear"))

    def block_count(self, config: Flux1Config) -> int:
        """Blocks in all: double blocks run first, then single ones."""
        return config.depth + config.depth_single

    def block_of(self, config: Flux1Config, name: str) -> int | None:
        """Which block a module or parameter is part of, counted in the order in which they run; None: it is outside."""
        kind, _, rest = name.partition(".")
        first = {"transformer_blocks": 0, "single_transformer_blocks": config.depth}.get(kind)
        return None if first is None else first + int(rest.partition(".")[0])

    def image_tokens(self, width: int, height: int) -> int:
        """See `activations.image_tokens`."""
        return image_tokens(width, height)

    def activation_bytes(
        self, config: Flux1Config, tokens: int, dtype: torch.dtype, quantization: str, compiled: bool
    ) -> int:
        """See `activations.activation_bytes`."""
        return activation_bytes(config, tokens, dtype, quantization, compiled)

    def build(self, config: Flux1Config) -> nn.Module:
        """Make the diffusers model; inside `torch.device("meta")` it costs no memory."""
        return model_class(self.diffusers_class)(**self.diffusers_config(config))

    def diffusers_config(self, config: Flux1Config) -> dict[str, Any]:
        """What diffusers' `config.json` says about a model with these sizes."""
        return {
            "patch_size": 1,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "num_single_layers": config.depth_single,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": config.num_heads,
            "joint_attention_dim": config.context_dim,
            "pooled_projection_dim": config.pooled_dim,
            "guidance_embeds": config.guidance,
            "axes_dims_rope": AXES_DIM,
        }

    def heads(self, config: Flux1Config) -> tuple[int, int]:
        """How many heads the attention has, and their width."""
        return config.num_heads, HEAD_DIM

    def regions(self, attention: Attention) -> tuple[Callable, Callable]:
        """The functions that run a double and a single block: the regions that are compiled."""

        def double(block, hidden_states, encoder_hidden_states, temb, rotary, mask):
            return blocks.double_block(block, hidden_states, encoder_hidden_states, temb, rotary, mask, attention)

        def single(block, hidden_states, temb, rotary, mask):
            return blocks.single_block(block, hidden_states, temb, rotary, mask, attention)

        return double, single

    def whole(self, attention: Attention) -> Callable:
        """The function that runs all blocks, for a single region in place of one per block."""

        def whole(model, hidden_states, encoder_hidden_states, temb, rotary, mask):
            for block in model.transformer_blocks:
                hidden_states, encoder_hidden_states = blocks.double_block(
                    block, hidden_states, encoder_hidden_states, temb, rotary, mask, attention
                )
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            for block in model.single_transformer_blocks:
                hidden_states = blocks.single_block(block, hidden_states, temb, rotary, mask, attention)
            return hidden_states

        return whole

    def forward(
        self, config: Flux1Config, model: nn.Module, regions: Sequence[Callable], weights: BlockWeights | None = None
    ) -> Flux1Forward:
        """Tie a model that `build` made to its regions, compiled or not; `weights` brings them where they compute."""
        return Flux1Forward(config, model, *regions, weights=weights)


@functools.lru_cache(maxsize=4)
def _lora_names(config: Flux1Config) -> tuple[ModuleNames[LoraTarget], ModuleNames[VectorWeight]]:
    # 3,000 names, wanted for every LoRA that is read.
    layout = checkpoint_layout(config)
    return ModuleNames(lora_linears(layout)), ModuleNames(lora_norms(layout))


@functools.lru_cache(maxsize=4)
def _absent_names(config: Flux1Config) -> ModuleNames[str]:
    return ModuleNames(lora_absent(config))
