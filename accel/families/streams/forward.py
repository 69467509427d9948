"""One forward: our own loop over diffusers' submodules.

Not diffusers' own `forward`: that one rounds the timestep to the model's dtype before it multiplies by 1000 (0.7367
becomes 0.74 in bfloat16), spreads ControlNet residuals differently from ComfyUI, and has no place between blocks for
patches, weight streaming or a step cache.

Shapes: b batch, t text tokens, i image tokens (references included), h hidden size.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...step_cache import StepCall
from ..base import BlockWeights, Region
from .inputs import BlockState, Hooks, Residuals, StreamInputs
from .layout import TIMESTEP_DIM
from .positions import Placement, Positions, pack, pad_to_patches, unpack

# Placements whose rotary tables are kept.
ROTARY_TABLES = 8

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Regions:
    """The functions that run blocks.

    Attributes:
        double: a double block, compiled or not; `single` likewise.
        whole: all blocks, where nothing has to happen between them; None: it is not to be used.
        open_double: a double block, uncompiled, which takes an `InsideAttention` as `inside`; `open_single` likewise.
    """

    double: Region
    single: Region
    whole: Region | None
    open_double: Region
    open_single: Region


class StreamForward(ABC):
    """Runs a diffusers model of double and single blocks, block by block.

    A family says how its blocks are conditioned, and what its regions read behind the block or model. The modules that
    every such model has are called as diffusers calls them.

    Attributes:
        positions: of the family.
    """

    positions: ClassVar[Positions]

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        regions: Regions,
        weights: BlockWeights | None = None,
    ) -> None:
        """Tie a model to the functions that run its blocks.

        Args:
            config: of the model.
            model: the family's.
            regions: of the model.
            weights: told of every block that is run, before and after; None where all of them stay in their places.
        """
        self.config = config
        self._model = model
        self._regions = regions
        self._weights = weights
        # So that a step of the same size computes none.
        self._rotary = functools.lru_cache(maxsize=ROTARY_TABLES)(self.positions.table_of)

    @abstractmethod
    def _condition(self, inputs: Any, hidden_states: Tensor, image_tokens: int) -> Any:
        """The family's conditioning; its attribute `temb`, ``b h``, is what the last norm reads.

        Args:
            inputs: the family's.
            hidden_states: ``b i h``, the embedded image tokens as hooks left them.
            image_tokens: how many are the image's own; references follow them.
        """

    @abstractmethod
    def _double_arguments(self, state: BlockState) -> Arguments:
        """What the region of a double block reads behind the block; it returns image tokens and text tokens."""

    @abstractmethod
    def _single_arguments(self, state: BlockState) -> Arguments:
        """What the region of a single block reads behind the block; it returns all tokens."""

    @abstractmethod
    def _whole_arguments(self, state: BlockState) -> Arguments:
        """What the region of all blocks reads behind the model; it returns all tokens."""

    def __call__(self, inputs: StreamInputs) -> Tensor:
        """Predict the velocity, ``b c height width`` in the transformer's dtype.

        Raises:
            SettingsError: an unknown reference method, see `Positions.place`.
        """
        model, latent, text = self._model, inputs.latent, inputs.encoder_hidden_states
        positions, patch_size = self.positions, self.positions.patch_size
        placement = positions.place(latent, inputs.references, inputs.reference_method, text.shape[1], inputs.rope)
        tokens = [pack(pad_to_patches(image, patch_size), patch_size) for image in (latent, *inputs.references)]
        image_tokens = tokens[0].shape[1]
        hidden_states = model.x_embedder(torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0])
        encoder_hidden_states = model.context_embedder(text)
        if inputs.hooks.after_embedding:
            hidden_states, encoder_hidden_states, rotary = self._after_embedding(
                inputs.hooks, placement, hidden_states, encoder_hidden_states
            )
        else:
            rotary = self._rotary(placement, latent.device)
        conditioning = self._condition(inputs, hidden_states, image_tokens)
        state = BlockState(
            hidden_states,
            encoder_hidden_states,
            conditioning,
            rotary,
            inputs.attention_mask,
            encoder_hidden_states.shape[1],
        )
        step_cache = None if inputs.hooks.need_every_block else inputs.step_cache
        state = self._run_blocks(state, inputs.residuals, inputs.hooks, step_cache, image_tokens)
        out = state.hidden_states[:, state.text_tokens : state.text_tokens + image_tokens]
        if step_cache is not None:
            step_cache.keep(out)
        velocity = model.proj_out(model.norm_out(out, conditioning.temb))
        grid = placement.grids[0]
        return unpack(velocity, grid.rows, grid.columns, patch_size)[..., : latent.shape[2], : latent.shape[3]]

    def _after_embedding(
        self, hooks: Hooks, placement: Placement, hidden_states: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text tokens as hooks leave them, and the rotary table of the positions that they leave."""
        batch, device = hidden_states.shape[0], hidden_states.device
        ids = self.positions.image_ids(placement, device).expand(batch, -1, -1)
        text_ids = self.positions.text_ids(placement, device).expand(batch, -1, -1)
        for hook in hooks.after_embedding:
            hidden_states, encoder_hidden_states, ids, text_ids = hook(
                hidden_states, encoder_hidden_states, ids, text_ids
            )
        table = self.positions.rotary_table(torch.cat([text_ids, ids], dim=1))
        return hidden_states, encoder_hidden_states, table

    def _run_blocks(
        self, state: BlockState, residuals: Residuals, hooks: Hooks, step_cache: StepCall | None, image_tokens: int
    ) -> BlockState:
        """Run all blocks, or as many as the step cache asks for."""
        whole = self._regions.whole
        alone = self._weights is None and step_cache is None and not hooks.need_every_block
        if whole is not None and alone and not any(residuals.places):
            joined = whole(self._model, *self._whole_arguments(state))
            return replace(state, hidden_states=joined, encoder_hidden_states=None)
        embedded, doubles = state.hidden_states, self._model.transformer_blocks
        for index, block in enumerate(doubles):
            run = functools.partial(self._run_double, hooks, index, index, block)
            state = _hooked(hooks, "double", index, run, state)
            _add(residuals.double, index, state.hidden_states)
            if index == 0 and step_cache is not None:
                skipped = _skip(step_cache, embedded, state, residuals, image_tokens)
                if skipped is not None:
                    return skipped
        state = _joined(state)
        text_tokens = state.text_tokens
        for index, block in enumerate(self._model.single_transformer_blocks):
            run = functools.partial(self._run_single, hooks, index, len(doubles) + index, block)
            state = _hooked(hooks, "single", index, run, state)
            _add(residuals.single, index, state.hidden_states[:, text_tokens:])
        return state

    def _run_double(self, hooks: Hooks, index: int, number: int, block: nn.Module, state: BlockState) -> BlockState:
        region = _opened(hooks, state, "double", index, self._regions.double, self._regions.open_double)
        image, text = self._run(region, number, block, self._double_arguments(state))
        return replace(state, hidden_states=image, encoder_hidden_states=text)

    def _run_single(self, hooks: Hooks, index: int, number: int, block: nn.Module, state: BlockState) -> BlockState:
        region = _opened(hooks, state, "single", index, self._regions.single, self._regions.open_single)
        joined = self._run(region, number, block, self._single_arguments(state))
        return replace(state, hidden_states=joined)

    def _run(self, region: Region, number: int, block: nn.Module, arguments: Arguments) -> Any:
        """Run a block while its weights are there."""
        if self._weights is None:
            return region(block, *arguments)
        self._weights.enter(number)
        try:
            return region(block, *arguments)
        finally:
            self._weights.leave(number)


def sinusoid(values: Tensor) -> Tensor:
    """Embed timesteps or guidance: ``b -> b 256``, float32, cosines first.

    Source: black-forest-labs/flux modules/layers.py, timestep_embedding(), time_factor 1000.
    """
    half = TIMESTEP_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * 1000.0 * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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


def _opened(hooks: Hooks, state: BlockState, kind: str, index: int, region: Region, opened: Region) -> Region:
    """What runs a block: its region, or, where something is to be done inside attention, its uncompiled function."""
    if hooks.inside_attention is None:
        return region
    return functools.partial(opened, inside=hooks.inside_attention(state, kind, index))


def _add(residuals: Sequence[Tensor | None], index: int, image: Tensor) -> None:
    """Add residual `index` in place to the first of the image tokens, ``b i h``, as ComfyUI does."""
    if index < len(residuals) and residuals[index] is not None:
        residual = residuals[index]
        image[:, : residual.shape[1]] += residual
