"""ComfyUI's call of the FLUX.1 transformer as the engine's inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....accel.families.flux1 import PATCH_SIZE, Flux1Inputs
from ....accel.families.flux1.inputs import Residuals
from ....accel.families.flux1.positions import RopeOptions
from ...transformer import STEP_CACHE, EngineTransformer
from .hooks import hooks_of

# An entry of transformer_options: guidance, (B,) float32, see `model.AcceleratedFlux`; or None.
GUIDANCE = "flux_hotswap_guidance"


class Flux1Transformer(EngineTransformer):
    """An engine of FLUX.1, called like `comfy.ldm.flux.model.Flux`."""

    patch_size = PATCH_SIZE
    inside_blocks = ("attn1_patch", "attn1_output_patch")

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict the velocity, (B, 16, h, w) in the engine's dtype, with the wrappers of other nodes around it.

        Args:
            x: (B, 16, h, w) latents; 32 or 96 channels with what ComfyUI concatenates for control and fill models.
            timestep: (B,) float32 in 0–1.
            context: (B, T, 4096) hidden states of the text.
            y: (B, 768) pooled text; None: zeros.
            guidance: (B,); only used where the options do not have it in float32.
            ref_latents: (1 or B, 16, h_i, w_i) each.
            control: "input" and "output", what a ControlNet adds after each double and each single block.
            transformer_options: ComfyUI's and other nodes' patches and wrappers.
            kwargs: `ref_latents_method` and `attention_mask`, (N, N) or (B, N, N) over text and image tokens.
        """
        options = transformer_options or {}
        return self._through_wrappers(
            self._predict, options, x, timestep, context, y, guidance, ref_latents, control, options, **kwargs
        )

    def _predict(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `forward`, inside the wrappers: each may have changed any of the arguments."""
        options, references, control = transformer_options or {}, ref_latents or [], control or {}
        if references:
            options = {**options, "reference_image_num_tokens": [_tokens(latent) for latent in references]}
        self._warn_of_patches_inside_blocks(options)
        exact_guidance, begin_call = options.get(GUIDANCE), options.get(STEP_CACHE)
        inputs = Flux1Inputs(
            latent=x.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=context.to(self.dtype),
            pooled_projections=None if y is None else y.to(self.dtype),
            guidance=_float32_on(x.device, guidance if exact_guidance is None else exact_guidance),
            references=[latent.to(self.dtype) for latent in references],
            reference_method=kwargs.get("ref_latents_method", "offset"),
            attention_mask=_per_head(kwargs.get("attention_mask")),
            residuals=Residuals(control.get("input", ()), control.get("output", ())),
            rope=RopeOptions(**options["rope_options"]) if options.get("rope_options") else RopeOptions(),
            hooks=hooks_of(options, self.engine.spec.config),
            step_cache=None if begin_call is None else begin_call(),
        )
        if inputs.step_cache is not None and inputs.hooks.around_block:
            self._warn_once(
                "blocks",
                "Flux Hotswap: a node patches blocks, and counts on every one to run in every step. Flux Step Cache "
                "skips nothing on this model. Remove one of the two nodes.",
            )
        return self._run(inputs, x)


def _tokens(latent: Tensor) -> int:
    """How many tokens a reference latent is; odd sizes are padded."""
    return math.ceil(latent.shape[-2] / PATCH_SIZE) * math.ceil(latent.shape[-1] / PATCH_SIZE)


def _float32_on(device: torch.device, values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(device, torch.float32)


def _per_head(mask: Tensor | None) -> Tensor | None:
    """(N, N) or (B, N, N) -> (1 or B, 1, N, N), as ComfyUI's attention functions do."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
