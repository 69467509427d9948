"""An engine as ComfyUI's BaseModel: what the sampler calls."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_base
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import Tensor, nn

from ..accel.engine import Engine
from ..accel.families.flux1 import PATCH_SIZE, Flux1Config, Flux1Inputs
from ..accel.families.flux1.inputs import BlockHook, BlockState, EmbeddingHook, Hooks, Residuals
from ..accel.families.flux1.positions import RopeOptions
from ..accel.offload.planner import Planner
from ..accel.offload.sizes import Workload
from ..accel.report import Sampling
from .native_lora import NativeLoras
from .offload import out_of_memory
from .skeleton import make_skeleton, unet_config

log = logging.getLogger(__name__)

GUIDANCE = "flux_hotswap_guidance"
STEP_CACHE = "flux_hotswap_step_cache"
# How many samplings of an engine are remembered for a report.
SAMPLINGS = 12
# Patches that run inside a block, where the compiled region has no place for them.
INSIDE_BLOCKS = ("attn1_patch", "attn1_output_patch")


class AcceleratedFlux(comfy.model_base.Flux):
    """ComfyUI's FLUX model around an engine. It has the sampling settings and conditioning, but no weights."""

    def __init__(self, engine: Engine, planner: Planner) -> None:
        """Describe the engine's model as ComfyUI would have detected it; `planner` is what its plans come from."""
        config = _model_config(engine)
        kind = comfy.model_base.ModelType.FLUX if engine.spec.config.guidance else comfy.model_base.ModelType.FLOW
        super().__init__(config, model_type=kind)
        self.diffusion_model = TransformerAdapter(engine, planner, make_skeleton(config.unet_config, engine.dtype))
        family, config = engine.spec.family, engine.spec.config
        self.native_loras = NativeLoras(family.layout(config), family.lora_absent(config), engine.lora_cache)
        self.samplings: collections.deque[Sampling] = collections.deque(maxlen=SAMPLINGS)
        self.last_load_s: float | None = None
        self.planner = planner
        # Clones of the patcher that exist, and whether ComfyUI has unloaded the engine since it was loaded last.
        self.handles = 0
        self.unloaded = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Names and shapes of ComfyUI's own FLUX model, without data: loader nodes match LoRA keys against them."""
        return self.diffusion_model.skeleton.state_dict(prefix="diffusion_model.")

    def memory_required(
        self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None, *_: Any, **__: Any
    ) -> int:
        """What a forward needs beside the weights: ComfyUI keeps it free, and batches conditions by it.

        Args:
            input_shape: (B, C, h, w) of the latents.
            cond_shapes: what ComfyUI knows of the conditions; of reference latents (1, 16, h · w) each.
        """
        engine = self.diffusion_model.engine
        batch, _, height, width = input_shape
        references = sum(math.prod(shape[2:]) for shape in (cond_shapes or {}).get("ref_latents", ()))
        tokens = Workload.text_tokens + (height * width + references) / PATCH_SIZE**2
        settings = engine.settings
        return engine.spec.family.activation_bytes(
            engine.spec.config,
            math.ceil(batch * tokens),
            engine.dtype,
            settings.quantization.mode,
            settings.compile != "off",
        )

    def _apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, *args, **kwargs
    ):
        # A ControlNet with a VAE reloads models in the middle of sampling, without pre_run; and schedules move on here.
        begin_call = None
        if self.current_patcher is not None:
            self.current_patcher.ensure_applied(transformer_options)
            begin_call = self.sampling_record.note_call(x.shape, transformer_options or {})
        # super() casts every condition to the model's dtype, and guidance is multiplied by 1000 afterwards: 3.5 would
        # become 3504 in bfloat16. It travels beside the others, in float32.
        options = {**(transformer_options or {}), GUIDANCE: kwargs.pop("guidance", None), STEP_CACHE: begin_call}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)


class TransformerAdapter(nn.Module):
    """Stands where ComfyUI expects the transformer, and translates its arguments for the engine."""

    patch_size = PATCH_SIZE

    def __init__(self, engine: Engine, planner: Planner, skeleton: nn.Module) -> None:
        """Hide the engine from nn.Module, so that ComfyUI's walks over modules and `.to` do not see it.

        Args:
            engine: what computes.
            planner: what its plans come from.
            skeleton: ComfyUI's own model of these sizes without data, for whoever looks for its attributes.
        """
        super().__init__()
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "skeleton", skeleton)
        self.planner = planner
        self.dtype = engine.dtype
        self._warned: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        """Answer for what ComfyUI's model has, such as `img_in` or `params`."""
        skeleton = self.__dict__.get("skeleton")
        if skeleton is None:
            return super().__getattr__(name)
        return getattr(skeleton, name)

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
        """Predict like comfy.ldm.flux.model.Flux.forward, with its arguments and wrappers."""
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def _forward(
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
        options = transformer_options or {}
        if ref_latents:
            tokens = [math.ceil(latent.shape[-2] / 2) * math.ceil(latent.shape[-1] / 2) for latent in ref_latents]
            options = {**options, "reference_image_num_tokens": tokens}
        self._warn_about_unsupported(options)
        control = control or {}
        dtype = self.dtype
        exact_guidance, begin_call = options.get(GUIDANCE), options.get(STEP_CACHE)
        inputs = Flux1Inputs(
            latent=x.to(dtype),
            timestep=timestep,
            encoder_hidden_states=context.to(dtype),
            pooled_projections=None if y is None else y.to(dtype),
            guidance=_on(x, guidance if exact_guidance is None else exact_guidance),
            references=[latent.to(dtype) for latent in ref_latents or ()],
            reference_method=kwargs.get("ref_latents_method", "offset"),
            attention_mask=_broadcast_mask(kwargs.get("attention_mask")),
            residuals=Residuals(control.get("input", ()), control.get("output", ())),
            rope=RopeOptions(**options["rope_options"]) if options.get("rope_options") else RopeOptions(),
            hooks=_hooks(options, self.engine.spec.config),
            step_cache=None if begin_call is None else begin_call(),
        )
        if inputs.step_cache is not None and inputs.hooks.around_block and "blocks" not in self._warned:
            self._warned.add("blocks")
            log.warning(
                "Flux Hotswap: a node patches blocks, and counts on every one to run in every step. Flux Step Cache "
                "skips nothing on this model. Remove one of the two nodes."
            )
        try:
            return self.engine(inputs)
        except torch.OutOfMemoryError as exc:
            exc.__traceback__ = None  # its frames hold the tensors of the step
            pixels = f"{8 * x.shape[-1]}×{8 * x.shape[-2]}"
            raise out_of_memory(self.engine, self.planner, f"a step of {pixels}, batch {x.shape[0]}") from exc

    def _warn_about_unsupported(self, options: dict[str, Any]) -> None:
        found = [name for name in INSIDE_BLOCKS if options.get("patches", {}).get(name)]
        if "optimized_attention_override" in options:
            found.append("optimized_attention_override")
        for name in found:
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "Flux Hotswap: a node patches the inside of attention (%s). The accelerated model cannot run that "
                    "and goes on without it. For this effect use ComfyUI's Load Diffusion Model.",
                    name,
                )


def _model_config(engine: Engine) -> Any:
    kind = comfy.supported_models.Flux if engine.spec.config.guidance else comfy.supported_models.FluxSchnell
    model_config = kind(unet_config(engine.spec.config))
    model_config.set_inference_dtype(engine.dtype, None)
    return model_config


def _on(x: Tensor, values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(x.device, torch.float32)


def _broadcast_mask(mask: Tensor | None) -> Tensor | None:
    """(N, N) or (B, N, N) -> (1 or B, 1, N, N), as ComfyUI's attention functions do."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _hooks(options: dict[str, Any], config: Flux1Config) -> Hooks:
    embedding = [_embedding_hook(patch, options) for patch in options.get("patches", {}).get("post_input", ())]
    around = {}
    totals = {"double_block": config.depth, "single_block": config.depth_single}
    for (name, index), patch in options.get("patches_replace", {}).get("dit", {}).items():
        if name in totals:
            kind = name.removesuffix("_block")
            known = {**options, "block_type": kind, "block_index": index, "total_blocks": totals[name]}
            around[kind, index] = _block_hook(patch, known)
    return Hooks(embedding, around)


def _embedding_hook(patch: Callable, options: dict[str, Any]) -> EmbeddingHook:
    def hook(image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, ...]:
        out = patch(
            {"img": image, "txt": text, "img_ids": image_ids, "txt_ids": text_ids, "transformer_options": options}
        )
        return out["img"], out["txt"], out["img_ids"], out["txt_ids"]

    return hook


def _block_hook(patch: Callable, options: dict[str, Any]) -> BlockHook:
    """Let a `patches_replace["dit"]` function run around one block, with the arguments of ComfyUI's model."""

    def hook(state: BlockState, run: Callable[[BlockState], BlockState]) -> BlockState:
        def original_block(args: dict[str, Any]) -> dict[str, Tensor]:
            return _as_output(run(_with(state, args)))

        known = options
        if state.encoder_hidden_states is None:
            known = {**options, "img_slice": [state.text_tokens, state.hidden_states.shape[1]]}
        args = {
            "img": state.hidden_states,
            "vec": state.conditioning,
            "pe": state.rotary,
            "attn_mask": state.mask,
            "transformer_options": known,
        }
        if state.encoder_hidden_states is not None:
            args["txt"] = state.encoder_hidden_states
        out = patch(args, {"original_block": original_block})
        return _with(state, {**args, **out})

    return hook


def _with(state: BlockState, args: dict[str, Any]) -> BlockState:
    return dataclasses.replace(
        state,
        hidden_states=args["img"],
        encoder_hidden_states=args.get("txt"),
        conditioning=args["vec"],
        rotary=args["pe"],
        mask=args.get("attn_mask"),
    )


def _as_output(state: BlockState) -> dict[str, Tensor]:
    out = {"img": state.hidden_states}
    if state.encoder_hidden_states is not None:
        out["txt"] = state.encoder_hidden_states
    return out
