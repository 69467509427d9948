"""One forward of FLUX.1: our own loop over diffusers' submodules.

Not `FluxTransformer2DModel.forward`: that one rounds the timestep to the model's dtype before it multiplies by 1000
(0.7367 becomes 0.74 in bfloat16), spreads ControlNet residuals differently from ComfyUI, and has no place between
blocks for patches, weight streaming or a step cache.

Shapes: b batch, t text tokens, i image tokens (references included), h hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...step_cache import StepCall
from ..base import BlockWeights
from .config import TIMESTEP_DIM, Flux1Config
from .inputs import BlockState, Flux1Inputs, Hooks, Residuals
from .positions import Placement, image_ids, pack, pad_to_patches, place, rotary_table, table_of, unpack

# Placements whose rotary tables are kept.
ROTARY_TABLES = 8

DoubleBlock = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
SingleBlock = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
AllBlocks = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
Activated = Callable[[Tensor], Tensor]


class Flux1Forward:
    """Runs a diffusers `FluxTransformer2DModel` block by block."""

    def __init__(
        self,
        config: Flux1Config,
        model: nn.Module,
        double: DoubleBlock,
        single: SingleBlock,
        whole: AllBlocks | None = None,
        weights: BlockWeights | None = None,
    ) -> None:
        """Tie a model to the functions that run its blocks (`blocks.double_block` and `single_block`, compiled).

        Args:
            config: of the model.
            model: a diffusers `FluxTransformer2DModel`.
            double: runs a double block.
            single: runs a single block.
            whole: runs all blocks, where nothing has to happen between them.
            weights: told of every block that is run, before and after; None where all of them stay in their places.
        """
        self.config = config
        self._model = model
        self._double = double
        self._single = single
        self._whole = whole
        self._weights = weights
        # So that a step of the same size computes none.
        self._rotary = functools.lru_cache(maxsize=ROTARY_TABLES)(table_of)

    def __call__(self, inputs: Flux1Inputs) -> Tensor:
        """Predict the velocity, ``b 16 height width`` in the transformer's dtype.

        Raises:
            SettingsError: an unknown reference method, see `positions.place`.
        """
        model, latent = self._model, inputs.latent
        placement = place(
            latent, inputs.references, inputs.reference_method, inputs.encoder_hidden_states.shape[1], inputs.rope
        )
        tokens = [pack(pad_to_patches(image)) for image in (latent, *inputs.references)]
        image_tokens = tokens[0].shape[1]
        hidden_states = model.x_embedder(torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0])
        encoder_hidden_states = model.context_embedder(inputs.encoder_hidden_states)
        conditioning = self._condition(inputs, hidden_states.dtype)
        if inputs.hooks.after_embedding:
            hidden_states, encoder_hidden_states, rotary = _after_embedding(
                inputs.hooks, placement, hidden_states, encoder_hidden_states
            )
        else:
            rotary = self._rotary(placement, latent.device)

        state = BlockState(
            hidden_states,
            encoder_hidden_states,
            conditioning,
            rotary,
            inputs.attention_mask,
            encoder_hidden_states.shape[1],
        )
        step_cache = None if inputs.hooks.around_block else inputs.step_cache
        state = self._run_blocks(state, inputs.residuals, inputs.hooks, step_cache, image_tokens)
        tokens = state.hidden_states[:, state.text_tokens : state.text_tokens + image_tokens]
        if step_cache is not None:
            step_cache.keep(tokens)
        velocity = model.proj_out(model.norm_out(tokens, conditioning))
        grid = placement.grids[0]
        return unpack(velocity, grid.rows, grid.columns)[..., : latent.shape[2], : latent.shape[3]]

    def _condition(self, inputs: Flux1Inputs, dtype: torch.dtype) -> Tensor:
        """``b h``: the sum of what timestep, guidance and pooled text are embedded as."""
        embed = self._model.time_text_embed
        pooled = inputs.pooled_projections
        if pooled is None:
            pooled = inputs.latent.new_zeros(inputs.latent.shape[0], self.config.pooled_dim, dtype=dtype)
        conditioning = embed.timestep_embedder(sinusoid(inputs.timestep).to(dtype))
        if self.config.guidance and inputs.guidance is not None:
            conditioning = conditioning + embed.guidance_embedder(sinusoid(inputs.guidance).to(dtype))
        return conditioning + embed.text_embedder(pooled[:, : self.config.pooled_dim].to(dtype))

    def _run_blocks(
        self, state: BlockState, residuals: Residuals, hooks: Hooks, step_cache: StepCall | None, image_tokens: int
    ) -> BlockState:
        """Run all blocks, or as many as the step cache asks for."""
        alone = self._weights is None and step_cache is None and not hooks.around_block and not any(residuals.places)
        if self._whole is not None and alone:
            return self._run_whole(state)
        embedded, activated = state.hidden_states, _activation_of(state.conditioning)
        for index, block in enumerate(self._model.transformer_blocks):
            run = functools.partial(self._run_double, index, block, activated)
            state = _hooked(hooks, "double", index, run, state)
            _add(residuals.double, index, state.hidden_states)
            if index == 0 and step_cache is not None:
                skipped = _skip(step_cache, embedded, state, residuals, image_tokens)
                if skipped is not None:
                    return skipped
        state = _joined(state)
        text_tokens = state.text_tokens
        for index, block in enumerate(self._model.single_transformer_blocks):
            run = functools.partial(self._run_single, index, block, activated)
            state = _hooked(hooks, "single", index, run, state)
            _add(residuals.single, index, state.hidden_states[:, text_tokens:])
        return state

    def _run_whole(self, state: BlockState) -> BlockState:
        """Run all blocks as one region."""
        image, text, temb = state.hidden_states, state.encoder_hidden_states, F.silu(state.conditioning)
        joined = self._whole(self._model, image, text, temb, state.rotary, state.mask)
        return replace(state, hidden_states=joined, encoder_hidden_states=None)

    def _run_double(self, index: int, block: nn.Module, activated: Activated, state: BlockState) -> BlockState:
        image, text, temb = state.hidden_states, state.encoder_hidden_states, activated(state.conditioning)
        image, text = self._run(self._double, index, block, image, text, temb, state.rotary, state.mask)
        return replace(state, hidden_states=image, encoder_hidden_states=text)

    def _run_single(self, index: int, block: nn.Module, activated: Activated, state: BlockState) -> BlockState:
        joined, temb, number = state.hidden_states, activated(state.conditioning), self.config.depth + index
        joined = self._run(self._single, number, block, joined, temb, state.rotary, state.mask)
        return replace(state, hidden_states=joined)

    def _run(self, region: Callable, index: int, block: nn.Module, *args: Tensor | None) -> Any:
        """Run a block while its weights are there."""
        if self._weights is None:
            return region(block, *args)
        self._weights.enter(index)
        try:
            return region(block, *args)
        finally:
            self._weights.leave(index)


def sinusoid(values: Tensor) -> Tensor:
    """Embed timesteps or guidance: ``b -> b 256``, float32, cosines first.

    Source: black-forest-labs/flux modules/layers.py, timestep_embedding(), time_factor 1000.
    """
    half = TIMESTEP_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * 1000.0 * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _after_embedding(
    hooks: Hooks, placement: Placement, hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text tokens as hooks leave them, and the rotary table of the positions that they leave."""
    batch = hidden_states.shape[0]
    ids = image_ids(placement, hidden_states.device).expand(batch, -1, -1)
    text_ids = ids.new_zeros(batch, placement.text_tokens, 3)
    for hook in hooks.after_embedding:
        hidden_states, encoder_hidden_states, ids, text_ids = hook(hidden_states, encoder_hidden_states, ids, text_ids)
    return hidden_states, encoder_hidden_states, rotary_table(torch.cat([text_ids, ids], dim=1))


def _activation_of(conditioning: Tensor) -> Activated:
    """SiLU, computed once for the conditioning that blocks share; a hook may give a block one of its own."""
    temb = F.silu(conditioning)
    return lambda given: temb if given is conditioning else F.silu(given)


def _skip(
    step_cache: StepCall, embedded: Tensor, state: BlockState, residuals: Residuals, image_tokens: int
) -> BlockState | None:
    """The state after all blocks, ``b i h`` of the image alone, if the first block says that the others may be skipped.

    Args:
        step_cache: asked.
        embedded: ``b i h``, what entered the first block.
        state: what left it.
        residuals: that are added after blocks.
        image_tokens: how many tokens are the image's own; references follow them.
    """
    first = state.hidden_states[:, :image_tokens]
    structure = embedded.shape[1], state.text_tokens, residuals.places
    tokens = step_cache.skip(embedded[:, :image_tokens], first, structure)
    if tokens is None:
        return None
    return replace(state, hidden_states=tokens, encoder_hidden_states=None, text_tokens=0)


def _joined(state: BlockState) -> BlockState:
    """Text and image tokens as one sequence, ``b (t i) h``, which single blocks read."""
    text, image = state.encoder_hidden_states, state.hidden_states
    joined = torch.cat([text, image], dim=1)
    return replace(state, hidden_states=joined, encoder_hidden_states=None, text_tokens=text.shape[1])


def _hooked(
    hooks: Hooks, kind: str, index: int, run: Callable[[BlockState], BlockState], state: BlockState
) -> BlockState:
    """Run one block, or the hook that is around it."""
    hook = hooks.around_block.get((kind, index))
    return run(state) if hook is None else hook(state, run)


def _add(residuals: Sequence[Tensor | None], index: int, image: Tensor) -> None:
    """Add residual `index` in place to the first of the image tokens, ``b i h``, as ComfyUI does."""
    if index < len(residuals) and residuals[index] is not None:
        residual = residuals[index]
        image[:, : residual.shape[1]] += residual
