"""The CLIP of FLUX's text encoders: ComfyUI's own, which remembers what it encoded and loads weights when it must."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux
import torch
from torch import Tensor

from ..accel.store.lru import ByteLru
from ..accel.text_encoder.spec import EncoderSpec
from .encoders import EncodersPatcher, FluxEncoders, host_memory_is_scarce

# 64 prompts of T5-XXL's 256 tokens.
CACHE_BYTES = 256 * 1024**2
# The encoders by the names of their tokens, and the part of the weights' names that is theirs.
PARTS = {"t5xxl": "t5xxl.", "l": "clip_l."}


class FluxClip(comfy.sd.CLIP):
    """A cheap handle on encoders that its clones share, with LoRAs and options of its own.

    Attributes:
        cache: T5's hidden states and CLIP-L's pooled vectors, each by its own tokens, options and LoRAs; shared by all
            clones. While both are there, no weights are needed, and none are loaded.
    """

    def __init__(
        self,
        t5: EncoderSpec,
        clip: EncoderSpec | None,
        mode: str,
        load_device: torch.device,
        offload_device: torch.device,
        embedding_directory: list[str] | None,
    ) -> None:
        """Make it from headers: nothing is read."""
        super().__init__(no_init=True)
        positions = {} if clip is None else {"clip_l_max_length": clip.config.max_position_embeddings}
        self.cond_stage_model = FluxEncoders(t5, clip, mode)
        self.tokenizer = comfy.text_encoders.flux.FluxTokenizer(embedding_directory, tokenizer_data=positions)
        self.tokenizer.t5xxl.embedding_size = t5.config.d_model
        if clip is not None:
            self.tokenizer.clip_l.embedding_size = clip.config.hidden_size
        stored = {parameter.dtype for parameter in self.cond_stage_model.parameters()}
        if not all(comfy.model_management.supports_cast(load_device, dtype) for dtype in stored):
            load_device = offload_device
        self.patcher = EncodersPatcher(self.cond_stage_model, load_device, offload_device)
        self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.patcher.is_clip = True
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None
        self.tokenizer_options = {}
        self.cache: ByteLru[Tensor] = ByteLru(CACHE_BYTES, lambda output: output.nbytes)

    def clone(self, *args: Any, **kwargs: Any) -> FluxClip:
        """Copy the handle, not the encoders, nor what they remember."""
        copy = object.__new__(type(self))
        copy.__dict__.update(super().clone(*args, **kwargs).__dict__, cache=self.cache)
        return copy

    def encode_from_tokens(
        self,
        tokens: dict[str, Any],
        return_pooled: Any = False,
        return_dict: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Encode like comfy.sd.CLIP, from memory where possible."""
        if args or kwargs or not self._can_remember():
            encoded = super().encode_from_tokens(tokens, return_pooled, return_dict, *args, **kwargs)
            self._release_if_scarce()
            return encoded
        keys = {part: self._key(part, tokens[part]) for part in PARTS}
        outputs = {part: self.cache.get(key) for part, key in keys.items()}
        if any(output is None for output in outputs.values()):
            known = {part: output for part, output in outputs.items() if output is not None}
            with self.cond_stage_model.knowing(known):
                encoded = super().encode_from_tokens(tokens, return_pooled or True)
            outputs = dict(zip(PARTS, encoded, strict=True))
            for part in PARTS.keys() - known.keys():
                self.cache.put(keys[part], outputs[part].cpu().clone())
            self._release_if_scarce()
        # Copies: a node may change what it gets.
        device = comfy.model_management.intermediate_device()
        cond, pooled = (outputs[part].to(device, copy=True) for part in PARTS)
        if return_dict:
            encoded = {"cond": cond, "pooled_output": pooled}
            self.add_hooks_to_dict(encoded)
            return encoded
        return (cond, pooled) if return_pooled else cond

    def get_sd(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights, when they are as in the files."""
        self.patcher.refuse_quantized("saved", "Copy the file, or load the T5 with quantization 'none'")
        return super().get_sd(*args, **kwargs)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights with LoRAs, when the T5 is not quantized."""
        self.patcher.refuse_quantized("saved", "Copy the file, or load the T5 with quantization 'none'")
        return super().state_dict_for_saving(*args, **kwargs)

    def get_key_patches(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What merging nodes ask for, when the T5 is not quantized."""
        self.patcher.refuse_quantized("merged")
        return super().get_key_patches(*args, **kwargs)

    def _can_remember(self) -> bool:
        """Whether tokens, layer and LoRAs decide the output alone: other nodes may have put hooks on the patcher."""
        patcher = self.patcher
        return not (
            patcher.forced_hooks or patcher.injections or patcher.object_patches or patcher.weight_wrapper_patches
        )

    def _key(self, part: str, tokens: Any) -> Hashable:
        if part == "l" and self.cond_stage_model.clip_l is None:
            return part, None  # zeros, whatever the tokens
        prefix = PARTS[part]
        patched = any(key.startswith(prefix) for key in self.patcher.patches)
        # Every change of the patches makes another uuid; a clone keeps it.
        return part, _content(tokens), self.layer_idx, self.patcher.patches_uuid if patched else None

    def _release_if_scarce(self) -> None:
        """On the CPU, ComfyUI never unloads a model by itself."""
        if comfy.model_management.is_device_cpu(self.patcher.load_device) and host_memory_is_scarce():
            self.patcher.detach()


def _content(tokens: Any) -> Hashable:
    """Batches of (token, weight, …) as a key; tensors, which embeddings are, by their bytes."""
    return tuple(tuple((_token(entry[0]), *entry[1:]) for entry in batch) for batch in tokens)


def _token(token: Any) -> Hashable:
    if isinstance(token, numbers.Integral):
        return int(token)
    if isinstance(token, Tensor):
        values = token.detach().cpu().float().contiguous()
        return tuple(token.shape), hashlib.sha256(values.numpy().tobytes()).digest()
    if isinstance(token, dict):
        return tuple((key, _token(value)) for key, value in sorted(token.items()))
    return token
