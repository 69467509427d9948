"""What an engine's BaseModel does, whatever its family: what ComfyUI's sampler calls."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..accel.history import Sampling
from ..accel.offload.sizes import activation_bytes
from ..accel.quantize import find_mode
from .native_lora import NativeLoras
from .sampling import SamplingRecord
from .transformer import STEP_CACHE, EngineTransformer

if TYPE_CHECKING:
    from .families.base import ComfyFamily

# How many samplings of an engine are remembered for a report.
SAMPLINGS = 12


class AcceleratedModel:
    """Comes before ComfyUI's class of a family among the bases of an engine's BaseModel.

    `class AcceleratedX(AcceleratedModel, comfy.model_base.X)` has X's sampling settings and conditioning, and no
    weights.

    Attributes:
        diffusion_model: the transformer, as ComfyUI calls it.
        planner: what decides how much of the device the engine takes.
        native_loras: reads the patches of ComfyUI's LoRA loaders.
        samplings: the last ones, for a report.
        sampling_record: of the sampling that runs; None between two.
        last_load_s: how long the last load took; None before the first.
        handles: clones of the patcher that exist.
        unloaded: whether ComfyUI has unloaded the engine since it was loaded last.
    """

    def __init__(
        self, family: ComfyFamily, transformer: EngineTransformer, model_config: Any, model_type: Any
    ) -> None:
        """Put a transformer where ComfyUI's own model would be.

        Args:
            family: of the engine.
            transformer: its `diffusion_model`.
            model_config: of `comfy.supported_models`, with `disable_unet_model_creation` in its `unet_config`.
            model_type: of `comfy.model_base.ModelType`.
        """
        super().__init__(model_config, model_type=model_type)
        engine = transformer.engine
        self.diffusion_model = transformer
        self.planner = transformer.planner
        self.native_loras = NativeLoras(engine.spec.family, engine.spec.config, family.scale_names, engine.lora_cache)
        self.samplings: collections.deque[Sampling] = collections.deque(maxlen=SAMPLINGS)
        self.sampling_record: SamplingRecord | None = None
        self.last_load_s: float | None = None
        self.handles = 0
        self.unloaded = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Names and shapes of ComfyUI's own model, without data: loader nodes match LoRA keys against them."""
        return self.diffusion_model.skeleton.state_dict(prefix="diffusion_model.")

    def memory_required(
        self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None, *_: Any, **__: Any
    ) -> int:
        """Bytes that a forward needs beside the weights: ComfyUI keeps them free, and batches conditions by them.

        Args:
            input_shape: (B, C, h, w) of the latents.
            cond_shapes: what ComfyUI knows of the conditions; of reference latents (1, C, h · w) each.
        """
        engine = self.diffusion_model.engine
        batch, _, height, width = input_shape
        references = sum(math.prod(shape[2:]) for shape in (cond_shapes or {}).get("ref_latents", ()))
        tokens = engine.spec.family.text_tokens + (height * width + references) / self.diffusion_model.patch_size**2
        mode = find_mode(engine.settings.quantization.mode)
        compiled = engine.settings.compile != "off"
        return activation_bytes(engine.spec, math.ceil(batch * tokens), engine.dtype, mode, compiled)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Run the model once, with this step's LoRAs.

        Args:
            x: (B, C, h, w) noisy latents.
            t: (B,) sigmas.
            c_concat: (B, C', h, w) that is concatenated to x.
            c_crossattn: (B, T, width) hidden states of the text.
            control: what a ControlNet adds.
            transformer_options: ComfyUI's and other nodes' patches and wrappers.
            args: what else a version of ComfyUI hands over.
            kwargs: the family's other conditions.

        Returns:
            (B, C, h, w), the denoised latents.
        """
        # A ControlNet with a VAE reloads models in the middle of sampling, without pre_run; and schedules move on here.
        begin_call = None
        if self.current_patcher is not None:
            self.current_patcher.ensure_applied(transformer_options)
            begin_call = self.sampling_record.note_call(x.shape, transformer_options or {})
        options = {**(transformer_options or {}), **self.exact_conditions(kwargs), STEP_CACHE: begin_call}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)

    def exact_conditions(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """Take what ComfyUI must not cast to the model's dtype out of a call's conditions: it goes with the options."""
        return {}
