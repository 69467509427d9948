"""T5 and CLIP-L as the one model that ComfyUI's CLIP holds, and its place in ComfyUI's memory management."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.clip_model
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd1_clip
import comfy.text_encoders.t5
import torch
from torch import Tensor, nn

from ..accel.errors import SettingsError
from ..accel.text_encoder.linear import WeightOnlyLinear
from ..accel.text_encoder.load import EncoderWeights, trim_heap
from ..accel.text_encoder.spec import EncoderSpec
from .progress import NodeObserver

log = logging.getLogger(__name__)

POOLED = 768
# Give weights back when less host memory than this is free.
SCARCE_BYTES = 2 * 1024**3


class FluxEncoders(nn.Module):
    """Both encoders under the names that ComfyUI gives them, by which LoRAs find their layers.

    Attributes:
        t5xxl: the T5.
        clip_l: the CLIP-L, or None.
        encode_counts: how often each encoder ran.
    """

    def __init__(self, t5: EncoderSpec, clip: EncoderSpec | None, mode: str) -> None:
        """Have the sizes of the files, without data."""
        super().__init__()
        config = {**dataclasses.asdict(t5.config), "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}
        self.t5xxl = comfy.sd1_clip.SDClipModel(
            device="meta",
            dtype=t5.stored_dtype,
            textmodel_json_config={**config, "model_type": "t5"},
            special_tokens={"end": 1, "pad": 0},
            model_class=comfy.text_encoders.t5.T5,
            model_options={"model_name": "t5xxl"},
        )
        weights = {"t5xxl": EncoderWeights(self.t5xxl.transformer, t5, mode)}
        self.clip_l: nn.Module | None = None
        if clip is not None:
            self.clip_l = _clip_model(clip)
            weights["clip_l"] = EncoderWeights(self.clip_l.transformer, clip, "none")
        self.mode = mode
        self.encode_counts = dict.fromkeys(("t5xxl", "l"), 0)
        # Not modules: nn.Module must not see them.
        self.weights = weights
        self._known: Mapping[str, Tensor] = {}
        for block in self.t5xxl.transformer.encoder.block:
            block.register_forward_pre_hook(_interruptible)

    @property
    def quantized(self) -> dict[str, WeightOnlyLinear]:
        """Quantized layers by their weights' names."""
        prefix = "t5xxl.transformer"
        return {f"{prefix}.{name}.weight": layer for name, layer in self.weights["t5xxl"].quantized.items()}

    @property
    def loaded(self) -> bool:
        """Whether the weights are there."""
        return all(weights.loaded for weights in self.weights.values())

    def fill(self, device: torch.device, work_device: torch.device) -> None:
        """Read what is not there; see `EncoderWeights.fill`."""
        for weights in self.weights.values():
            if weights.loaded:
                continue
            report = weights.fill(device, work_device, NodeObserver().loading)
            log.info(
                "Flux Hotswap: read '%s' in %.1f s: %.2f GB, quantization %s",
                weights.spec.file.name,
                report.seconds,
                report.bytes / 1e9,
                self.mode if weights.quantized else "none",
            )
        trim_heap()

    def clear(self) -> None:
        """Give the memory back. The next `fill` reads the files again."""
        for weights in self.weights.values():
            weights.clear()
        trim_heap()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """As ComfyUI's text encoders have it."""
        for encoder in self._encoders():
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """As ComfyUI's text encoders have it."""
        for encoder in self._encoders():
            encoder.reset_clip_options()

    def encode_part(self, part: str, tokens: Any) -> Tensor:
        """Encode for one of the encoders.

        Args:
            part: "t5xxl" -> (1, L, d_model) float32; "l" -> the pooled vector (1, hidden) float32.
            tokens: what the tokenizer gave for it.
        """
        if part == "t5xxl":
            self.encode_counts[part] += 1
            return self.t5xxl.encode_token_weights(tokens)[0]
        if self.clip_l is None:
            return torch.zeros(1, POOLED, device=comfy.model_management.intermediate_device())
        self.encode_counts[part] += 1
        return self.clip_l.encode_token_weights(tokens)[1]

    @contextmanager
    def knowing(self, outputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Take these for what `encode_part` would give, and run only the other encoder."""
        self._known = outputs
        try:
            yield
        finally:
            self._known = {}

    def encode_token_weights(self, token_weight_pairs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """T5's hidden states and CLIP-L's pooled vector, as ComfyUI's FLUX text encoder gives them."""
        return tuple(
            self._known[part] if part in self._known else self.encode_part(part, token_weight_pairs[part])
            for part in ("t5xxl", "l")
        )

    def _encoders(self) -> list[nn.Module]:
        return [encoder for encoder in (self.t5xxl, self.clip_l) if encoder is not None]


class EncodersPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher, for weights that come and go, and LoRAs that never write into quantized ones."""

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        """Read the weights if they are not there, then load as ComfyUI does."""
        if not self.model.loaded:
            on_gpu = comfy.model_management.is_device_cuda(self.load_device)
            self.model.fill(self.offload_device, self.load_device if on_gpu else self.offload_device)
        return super().partially_load(*args, **kwargs)

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Load, then put LoRAs on the quantized layers."""
        super().load(*args, **kwargs)
        self._attach_loras()

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Unload in part; ComfyUI adds each LoRA to the layers that it moves, and those have theirs already."""
        freed = super().partially_unload(*args, **kwargs)
        self._attach_loras()
        return freed

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Take the LoRAs off again."""
        super().unpatch_model(device_to, unpatch_weights, *args, **kwargs)
        if unpatch_weights:
            for layer in self.model.quantized.values():
                layer.weight_function = []

    def detach(self, unpatch_all: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Leave the device. A copy stays in host memory only if that is another place, and has room."""
        model = super().detach(unpatch_all, *args, **kwargs)
        if unpatch_all and (self.load_device == self.offload_device or host_memory_is_scarce()):
            self.model.clear()
        return model

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Merge LoRAs into plain weights only."""
        if key in self.model.quantized:
            return self.model.quantized[key].weight
        return super().patch_weight_to_device(key, *args, **kwargs)

    def add_hook_patches(self, hook: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        """Take scheduled LoRAs, but not for quantized layers."""
        keys = [key if isinstance(key, str) else key[0] for key in patches]
        found = [key for key in keys if key in self.model.quantized]
        if found:
            raise SettingsError(
                f"A LoRA that is scheduled by a hook changes '{found[0]}' ({len(found)} layers of the T5), which is "
                f"quantized ({self.model.mode}). Use Load LoRA instead of the hook, or load the T5 with quantization "
                "'none'."
            )
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def set_injections(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Take any injection but, when quantized, that of the bypass loader."""
        if key == "bypass_lora":
            self.refuse_quantized("used with Load LoRA (Bypass)", "Use Load LoRA: it writes into no weight")
        super().set_injections(key, *args, **kwargs)

    def refuse_quantized(self, what: str, instead: str = "Load the T5 with quantization 'none'") -> None:
        """Say that a quantized T5 cannot be used so.

        Raises:
            SettingsError: the T5 is quantized.
        """
        if self.model.quantized:
            raise SettingsError(
                f"The T5 '{self.model.weights['t5xxl'].spec.file.name}' is quantized ({self.model.mode}), and cannot "
                f"be {what}. {instead}."
            )

    def _attach_loras(self) -> None:
        for key, layer in self.model.quantized.items():
            patches = self.patches.get(key)
            layer.weight_function = [_Lora(key, patches)] if patches else []


class _Lora:
    """A layer's LoRAs as a function from its weight to the changed one."""

    def __init__(self, key: str, patches: list[Any]) -> None:
        self._key, self._patches = key, list(patches)

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self._patches, weight, self._key, intermediate_dtype=weight.dtype)


def host_memory_is_scarce() -> bool:
    """Whether text encoders should not stay in host memory for later."""
    return comfy.model_management.get_free_memory(torch.device("cpu")) < SCARCE_BYTES


def _clip_model(spec: EncoderSpec) -> nn.Module:
    config = {**dataclasses.asdict(spec.config), "num_attention_heads": spec.config.num_attention_heads}
    model = comfy.sd1_clip.SDClipModel(
        device="meta",
        dtype=spec.stored_dtype,
        max_length=spec.config.max_position_embeddings,
        textmodel_json_config={**config, "hidden_act": "quick_gelu", "eos_token_id": 49407},
        model_class=comfy.clip_model.CLIPTextModel,
        return_projected_pooled=False,
        model_options={"model_name": "clip_l"},
    )
    if "text_projection.weight" not in spec.weights:
        # FLUX takes the pooled vector before the projection; ComfyUI's model computes it all the same.
        model.transformer.text_projection = nn.Identity()
    return model


def _interruptible(*_: Any) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
