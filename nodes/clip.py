"""ComfyUI's CLIP around text encoders that remember what they encoded, and load their weights only when they must."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..accel.errors import SettingsError
from ..accel.memory.budgets import MIB
from ..accel.store.lru import ByteLru
from .encoders import Encoded, Encoders, EncodersPatcher, host_memory_is_scarce

# Some sixty prompts of a T5, 4 MB each; ten to sixteen of a language model of which three layers lie side by side.
CACHE_BYTES = 256 * MIB


class RememberingClip(comfy.sd.CLIP):
    """A cheap handle on encoders that its clones share, with LoRAs and options of its own.

    Attributes:
        cond_stage_model: the encoders.
        cache: what each encoder gave, by its own tokens, options and LoRAs; shared by all clones. While the outputs of
            all encoders are there, no weights are needed, and none are loaded.
    """

    def __init__(
        self, encoders: Encoders, tokenizer: Any, load_device: torch.device, offload_device: torch.device
    ) -> None:
        """Make it of encoders that have no weights yet: nothing is read.

        Args:
            encoders: what encodes.
            tokenizer: ComfyUI's, whose tokens they take.
            load_device: where they compute, unless it lacks a dtype of theirs.
            offload_device: where their weights wait, and then compute.
        """
        super().__init__(no_init=True)
        self.cond_stage_model = encoders
        self.tokenizer = tokenizer
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
        self.cache: ByteLru[Encoded] = ByteLru(CACHE_BYTES, lambda output: sum(part.nbytes for part in output))

    def clone(self, *args: Any, **kwargs: Any) -> RememberingClip:
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
        encoders = self.cond_stage_model
        keys = {part: self._key(part, tokens[part]) for part in encoders.modules_of}
        remembered = {part: self.cache.get(key) for part, key in keys.items()}
        outputs = {part: output for part, output in remembered.items() if output is not None}
        if len(outputs) < len(keys):
            with encoders.knowing(outputs) as complete:
                super().encode_from_tokens(tokens, return_pooled or True)
            for part in complete.keys() - outputs.keys():
                self.cache.put(keys[part], tuple(tensor.cpu().clone() for tensor in complete[part]))
            outputs = complete
            self._release_if_scarce()
        # Copies: a node may change what it gets.
        device = comfy.model_management.intermediate_device()
        copies = {part: tuple(each.to(device, copy=True) for each in output) for part, output in outputs.items()}
        cond, pooled, extra = encoders.conditioning(copies)
        if return_dict:
            encoded = {"cond": cond, "pooled_output": pooled, **extra}
            self.add_hooks_to_dict(encoded)
            return encoded
        return (cond, pooled) if return_pooled else cond

    def generate(self, *_: Any, **__: Any) -> Any:
        """Refuse what a language model does elsewhere: its last layers are not loaded.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            f"The {self.cond_stage_model.title} of Flux Text Encoder Loader encodes prompts, and writes no text. Load "
            "the complete model with ComfyUI's own Load CLIP for that."
        )

    def get_sd(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights, when they are as in the files."""
        self._refuse_to_save_quantized()
        return super().get_sd(*args, **kwargs)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights with LoRAs, when they are as in the files."""
        self._refuse_to_save_quantized()
        return super().state_dict_for_saving(*args, **kwargs)

    def get_key_patches(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What merging nodes ask for, when the weights are as in the files."""
        self.patcher.refuse_quantized("merged")
        return super().get_key_patches(*args, **kwargs)

    def _refuse_to_save_quantized(self) -> None:
        title = self.cond_stage_model.title
        self.patcher.refuse_quantized("saved", f"Copy the file, or load the {title} with quantization 'none'")

    def _can_remember(self) -> bool:
        """Whether tokens, layer and LoRAs decide the output alone: other nodes may have put hooks on the patcher."""
        patcher = self.patcher
        return not (
            patcher.forced_hooks or patcher.injections or patcher.object_patches or patcher.weight_wrapper_patches
        )

    def _key(self, part: str, tokens: Any) -> Hashable:
        if not self.cond_stage_model.has(part):
            return part, None  # the same, whatever the tokens
        prefix = f"{self.cond_stage_model.modules_of[part]}."
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
