"""One forward of FLUX.1: our own loop over diffusers' submodules.

Not `FluxTransformer2DModel.forward`: that one rounds the timestep to the model's dtype before it multiplies by 1000
(0.7367 becomes 0.74 in bfloat16), spreads ControlNet residuals differently from ComfyUI, and has no place between
blocks for patches, weight streaming or a step cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...step_cache import StepCall
from ..base import BlockWeights
from .config import TIMESTEP_DIM, Flux1Config
from .positions import RopeOptions, image_ids, pack, pad_to_patches, place, rotary_table, table_of, unpack

# Placements whose rotary tables are kept.
ROTARY_TABLES = 8

DoubleBlock = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
SingleBlock = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
AllBlocks = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class BlockState:
    """What enters and leaves one block.

    Attributes:
        hidden_states: (B, I, H) image tokens in a double block, (B, T + I, H) all tokens in a single one.
        encoder_hidden_states: (B, T, H) text tokens in a double block, None in a single one.
        conditioning: (B, H) embedding of timestep, guidance and pooled text, before its activation.
        rotary: see `positions.rotary_table`.
        mask: attention mask or None.
        text_tokens: T.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor | None
    conditioning: Tensor
    rotary: Tensor
    mask: Tensor | None
    text_tokens: int


BlockHook = Callable[[BlockState, Callable[[BlockState], BlockState]], BlockState]
EmbeddingHook = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Hooks:
    """What others want to do between blocks.

    Attributes:
        after_embedding: each takes and returns image tokens (B, I, H), text tokens (B, T, H), image positions
            (B, I, 3) and text positions (B, T, 3).
        around_block: by ("double" or "single", index); each gets the state and the block to call.
    """

    after_embedding: Sequence[EmbeddingHook] = ()
    around_block: Mapping[tuple[str, int], BlockHook] = field(default_factory=dict)


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds after each block to the first image tokens; lists may be short or hold None.

    Attributes:
        double: entry i, (B, n, H), is added after double block i.
        single: entry i, (B, n, H), is added after single block i, behind the text tokens.
    """

    double: Sequence[Tensor | None] = ()
    single: Sequence[Tensor | None] = ()

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """After which double and which single blocks something is added."""
        return tuple(
            tuple(index for index, residual in enumerate(kind) if residual is not None)
            for kind in (self.double, self.single)
        )


@dataclass(frozen=True)
class Flux1Inputs:
    """One forward's inputs, in the transformer's dtype and on its device unless stated.

    Attributes:
        latent: (B, C, h, w); C is 16, or 32 / 96 with what a control or fill model concatenates.
        timestep: (B,) float32 in 0–1.
        encoder_hidden_states: (B, T, context width).
        pooled_projections: (B, at least the pooled width), or None for zeros.
        guidance: (B,) float32, or None to leave the guidance embedding out.
        references: see `positions.place`.
        reference_method: see `positions.place`.
        attention_mask: see `accel.attention.sdpa`; over text and image tokens.
        residuals: ControlNet residuals.
        rope: scales and shifts of positions.
        hooks: patches between blocks.
        step_cache: asked whether to skip all blocks but the first; not asked while hooks patch blocks, which they
            expect to run in every step.
    """

    latent: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor | None = None
    guidance: Tensor | None = None
    references: Sequence[Tensor] = ()
    reference_method: str = "offset"
    attention_mask: Tensor | None = None
    residuals: Residuals = Residuals()
    rope: RopeOptions = RopeOptions()
    hooks: Hooks = Hooks()
    step_cache: StepCall | None = None


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
        """Predict the velocity: (B, 16, h, w) in the transformer's dtype."""
        model, hooks = self._model, inputs.hooks
        latent = inputs.latent
        placement = place(
            latent, inputs.references, inputs.reference_method, inputs.encoder_hidden_states.shape[1], inputs.rope
        )
        image_grid = placement.grids[0]
        tokens = [pack(pad_to_patches(picture)) for picture in (latent, *inputs.references)]
        image_tokens = tokens[0].shape[1]
        hidden_states = model.x_embedder(torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0])
        encoder_hidden_states = model.context_embedder(inputs.encoder_hidden_states)
        conditioning = self._condition(inputs, hidden_states.dtype)

        if hooks.after_embedding:
            batch = latent.shape[0]
            ids = image_ids(placement, latent.device).expand(batch, -1, -1)
            text_ids = ids.new_zeros(batch, placement.text_tokens, 3)
            for hook in hooks.after_embedding:
                hidden_states, encoder_hidden_states, ids, text_ids = hook(
                    hidden_states, encoder_hidden_states, ids, text_ids
                )
            rotary = rotary_table(torch.cat([text_ids, ids], dim=1))
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
        step_cache = None if hooks.around_block else inputs.step_cache
        state = self._run_blocks(state, inputs.residuals, hooks, step_cache, image_tokens)
        tokens = state.hidden_states[:, state.text_tokens : state.text_tokens + image_tokens]
        if step_cache is not None:
            step_cache.keep(tokens)
        velocity = model.proj_out(model.norm_out(tokens, conditioning))
        return unpack(velocity, image_grid.rows, image_grid.columns)[..., : latent.shape[2], : latent.shape[3]]

    def _condition(self, inputs: Flux1Inputs, dtype: torch.dtype) -> Tensor:
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
        conditioning, temb = state.conditioning, F.silu(state.conditioning)
        embedded = state.hidden_states
        alone = self._weights is None and step_cache is None and not hooks.around_block and not any(residuals.places)
        if self._whole is not None and alone:
            image, text = state.hidden_states, state.encoder_hidden_states
            joined = self._whole(self._model, image, text, temb, state.rotary, state.mask)
            return replace(state, hidden_states=joined, encoder_hidden_states=None)

        def activated(state: BlockState) -> Tensor:
            return temb if state.conditioning is conditioning else F.silu(state.conditioning)

        for index, block in enumerate(self._model.transformer_blocks):

            def double(state: BlockState, index: int = index, block: nn.Module = block) -> BlockState:
                hidden_states, encoder_hidden_states = self._run(
                    self._double,
                    index,
                    block,
                    state.hidden_states,
                    state.encoder_hidden_states,
                    activated(state),
                    state.rotary,
                    state.mask,
                )
                return replace(state, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)

            state = _hooked(hooks, "double", index, double, state)
            _add(residuals.double, index, state.hidden_states)
            if index == 0 and step_cache is not None:
                first = state.hidden_states[:, :image_tokens]
                structure = embedded.shape[1], state.text_tokens, residuals.places
                tokens = step_cache.skip(embedded[:, :image_tokens], first, structure)
                if tokens is not None:
                    return replace(state, hidden_states=tokens, encoder_hidden_states=None, text_tokens=0)

        text_tokens = state.encoder_hidden_states.shape[1]
        joined = torch.cat([state.encoder_hidden_states, state.hidden_states], dim=1)
        state = replace(state, hidden_states=joined, encoder_hidden_states=None, text_tokens=text_tokens)
        for index, block in enumerate(self._model.single_transformer_blocks):

            def single(state: BlockState, index: int = index, block: nn.Module = block) -> BlockState:
                hidden_states = self._run(
                    self._single,
                    self.config.depth + index,
                    block,
                    state.hidden_states,
                    activated(state),
                    state.rotary,
                    state.mask,
                )
                return replace(state, hidden_states=hidden_states)

            state = _hooked(hooks, "single", index, single, state)
            _add(residuals.single, index, state.hidden_states[:, text_tokens:])
        return state

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
    """Embed timesteps or guidance: (B,) float32 -> (B, 256) float32, cosines first.

    Source: black-forest-labs/flux modules/layers.py, timestep_embedding(), time_factor 1000.
    """
    half = TIMESTEP_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * 1000.0 * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _hooked(
    hooks: Hooks, kind: str, index: int, run: Callable[[BlockState], BlockState], state: BlockState
) -> BlockState:
    hook = hooks.around_block.get((kind, index))
    return run(state) if hook is None else hook(state, run)


def _add(residuals: Sequence[Tensor | None], index: int, image: Tensor) -> None:
    """Add residual `index` in place to the first of the image tokens, as ComfyUI does."""
    if index < len(residuals) and residuals[index] is not None:
        residual = residuals[index]
        image[:, : residual.shape[1]] += residual
