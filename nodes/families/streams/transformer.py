"""ComfyUI's call of a transformer of double and single blocks as the engine's inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....accel.families.streams.inputs import Residuals, StreamInputs
from ....accel.families.streams.positions import RopeOptions
from ...transformer import STEP_CACHE, EngineTransformer
from .hooks import Vec, hooks_of

# An entry of transformer_options: guidance, (B,) float32, see `take_guidance`; or None.
GUIDANCE = "flux_hotswap_guidance"


def take_guidance(conditions: dict[str, Any]) -> dict[str, Any]:
    """Take guidance, (B,) float32, out of a call's conditions, for the options.

    ComfyUI multiplies it by 1000 after the cast, and 3.5 would be 3504 in bfloat16.
    """
    return {GUIDANCE: conditions.pop("guidance", None)}


class StreamTransformer(EngineTransformer, ABC):
    """An engine of such a family, called like `comfy.ldm.flux.model.Flux`.

    Attributes:
        vec: what block patches get.
    """

    vec: ClassVar[Vec]

    @abstractmethod
    def _inputs(self, y: Tensor | None, guidance: Tensor | None, common: dict[str, Any]) -> StreamInputs:
        """The family's inputs.

        Args:
            y: (B, P) pooled text, or None.
            guidance: (B,) float32, or None.
            common: what `StreamInputs` has.
        """

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
        """Predict the velocity, (B, C, h, w) in the engine's dtype, with the wrappers of other nodes around it.

        Args:
            x: (B, C, h, w) latents; more channels with what ComfyUI concatenates for control and fill models.
            timestep: (B,) float32 in 0–1.
            context: (B, T, width) hidden states of the text.
            y: (B, P) pooled text, where the family reads it; None: zeros.
            guidance: (B,); only used where the options do not have it in float32.
            ref_latents: (1 or B, C, h_i, w_i) each.
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
            options = {**options, "reference_image_num_tokens": [self._tokens(latent) for latent in references]}
        self._warn_of_attention_override(options)
        exact_guidance, begin_call = options.get(GUIDANCE), options.get(STEP_CACHE)
        common = {
            "latent": x.to(self.dtype),
            "timestep": timestep,
            "encoder_hidden_states": context.to(self.dtype),
            "references": [latent.to(self.dtype) for latent in references],
            "reference_method": kwargs.get("ref_latents_method") or getattr(self.params, "default_ref_method", None),
            "attention_mask": _per_head(kwargs.get("attention_mask")),
            "residuals": Residuals(control.get("input", ()), control.get("output", ())),
            "rope": RopeOptions(**options["rope_options"]) if options.get("rope_options") else RopeOptions(),
            "hooks": hooks_of(options, self.engine.spec.config, self.vec),
            "step_cache": None if begin_call is None else begin_call(),
        }
        given = guidance if exact_guidance is None else exact_guidance
        inputs = self._inputs(y, None if given is None else given.to(x.device, torch.float32), common)
        if inputs.hooks.inside_attention is not None:
            self._warn_once(
                "attention",
                "Flux Hotswap: a node changes the inside of attention: blocks run uncompiled for it, which is slower.",
            )
        if inputs.step_cache is not None and inputs.hooks.need_every_block:
            self._warn_once(
                "blocks",
                "Flux Hotswap: a node patches blocks, and counts on every one to run in every step. Flux Step Cache "
                "skips nothing on this model. Remove one of the two nodes.",
            )
        return self._run(inputs, x)

    def _tokens(self, latent: Tensor) -> int:
        """How many tokens a reference latent is; it is padded to whole patches."""
        return math.ceil(latent.shape[-2] / self.patch_size) * math.ceil(latent.shape[-1] / self.patch_size)


def _per_head(mask: Tensor | None) -> Tensor | None:
    """(N, N) or (B, N, N) -> (1 or B, 1, N, N), as ComfyUI's attention functions do."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
