"""Text encoders as the one model that ComfyUI's CLIP holds, and its place in ComfyUI's memory management."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ..accel.errors import SettingsError
from ..accel.memory.budgets import GIB, give_back_freed
from ..accel.text_encoder.linear import WeightOnlyLinear
from ..accel.text_encoder.load import EncoderWeights
from ..accel.text_encoder.spec import EncoderSpec
from .progress import NodeObserver

log = logging.getLogger(__name__)

# What an encoder gives for one prompt, and what a conditioning has beside context and pooled vector.
Encoded = tuple[Tensor, ...]
Extra = dict[str, Tensor]

# Give weights back when less host memory than this is free.
SCARCE_BYTES = 2 * GIB


class Encoders(nn.Module):
    """Text encoders under the names that ComfyUI gives them, by which LoRAs find their layers.

    A family's subclass makes them, and says how their outputs become a conditioning.

    Attributes:
        modules_of: what the tokenizer calls an encoder's tokens -> its name here, such as "l" -> "clip_l".
        title: what messages call the encoder that may be quantized.
        weights: the encoders' weights, by the names here; a text encoder that the user has not is not among them.
        mode: how the weights of the one that may be quantized are kept.
        encode_counts: how often each encoder ran, by the names of the tokens.
    """

    def __init__(
        self,
        modules_of: Mapping[str, str],
        encoders: Mapping[str, tuple[nn.Module, EncoderSpec]],
        mode: str,
        quantized: str,
    ) -> None:
        """Have the sizes of the files, without data.

        Args:
            modules_of: see the class.
            encoders: by the names here: ComfyUI's `SDClipModel` on the meta device, and the file of its weights.
            mode: of `accel.text_encoder.modes`.
            quantized: which of them it is for; the others stay as their files have them.
        """
        super().__init__()
        self.modules_of = modules_of
        self.title = encoders[quantized][1].config.title
        # Not modules: nn.Module must not see them.
        self.weights: dict[str, EncoderWeights] = {}
        for name, (encoder, spec) in encoders.items():
            self.add_module(name, encoder)
            self.weights[name] = EncoderWeights(encoder.transformer, spec, mode if name == quantized else "none")
        self.mode = mode
        self.encode_counts = dict.fromkeys(self.modules_of, 0)
        self._outputs: dict[str, Encoded] | None = None

    def encode_part(self, part: str, tokens: Any) -> Encoded:
        """Run one encoder, or give what stands for one that is not there.

        Args:
            part: the name of its tokens.
            tokens: what the tokenizer gave for it.
        """
        raise NotImplementedError

    def conditioning(self, outputs: Mapping[str, Encoded]) -> tuple[Tensor, Tensor | None, Extra]:
        """What ComfyUI's text encoders of the family give: the context (1, T, C), the pooled vector or None, and more.

        Args:
            outputs: of all encoders, by the names of their tokens.
        """
        raise NotImplementedError

    @property
    def quantized(self) -> dict[str, WeightOnlyLinear]:
        """Quantized layers by their weights' names."""
        return {
            f"{encoder}.transformer.{name}.weight": layer
            for encoder, weights in self.weights.items()
            for name, layer in weights.quantized.items()
        }

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
        give_back_freed()

    def clear(self) -> None:
        """Give the memory back. The next `fill` reads the files again."""
        for weights in self.weights.values():
            weights.clear()
        give_back_freed()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """As ComfyUI's text encoders have it."""
        for encoder in self._encoders():
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        """As ComfyUI's text encoders have it."""
        for encoder in self._encoders():
            encoder.reset_clip_options()

    def has(self, part: str) -> bool:
        """Whether the encoder for these tokens is there."""
        return self.modules_of[part] in self.weights

    @contextmanager
    def knowing(self, outputs: Mapping[str, Encoded]) -> Iterator[Mapping[str, Encoded]]:
        """Take these for what `encode_part` would give, and run only the other encoders.

        Args:
            outputs: by the names of the tokens.

        Yields:
            The same and, once `encode_token_weights` has run, what the others gave.
        """
        self._outputs = dict(outputs)
        try:
            yield self._outputs
        finally:
            self._outputs = None

    def encode_token_weights(
        self, token_weight_pairs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor | None, Extra]:
        """As ComfyUI's text encoders have it: tokens by the tokenizer's names -> see `conditioning`."""
        outputs = {} if self._outputs is None else self._outputs
        for part in self.modules_of:
            if part not in outputs:
                outputs[part] = self.encode_part(part, token_weight_pairs[part])
        return self.conditioning(outputs)

    def _encoders(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.weights]


def interruptible(blocks: nn.ModuleList) -> None:
    """Let a prompt be cancelled between the blocks of an encoder."""
    for block in blocks:
        block.register_forward_pre_hook(_check_interrupted)


def _check_interrupted(*_: Any) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


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
                f"A LoRA that is scheduled by a hook changes '{found[0]}' ({len(found)} layers of the "
                f"{self.model.title}), which is quantized ({self.model.mode}). Use Load LoRA instead of the hook, or "
                f"load the {self.model.title} with quantization 'none'."
            )
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def set_injections(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Take any injection but, when quantized, that of the bypass loader."""
        if key == "bypass_lora":
            self.refuse_quantized("used with Load LoRA (Bypass)", "Use Load LoRA: it writes into no weight")
        super().set_injections(key, *args, **kwargs)

    def refuse_quantized(self, what: str, instead: str = "") -> None:
        """Say that a quantized encoder cannot be used so.

        Args:
            what: what was to be done with it, as a participle.
            instead: what to do; by default to load it without quantization.

        Raises:
            SettingsError: it is quantized.
        """
        for weights in self.model.weights.values():
            if weights.quantized:
                title, name = self.model.title, weights.spec.file.name
                instead = instead or f"Load the {title} with quantization 'none'"
                raise SettingsError(
                    f"The {title} '{name}' is quantized ({self.model.mode}), and cannot be {what}. {instead}."
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
