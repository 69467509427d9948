"""What the pack relies on in ComfyUI, by name: checked once at the start, part by part.

A version of ComfyUI that lacks something costs the part that needs it, and one line in the log says which. Nothing of
ComfyUI is imported before it is checked, so that this module loads in every version. What a family of models needs is
listed in its own folder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .families import registry
from .reliance import (
    CLIP_LORAS,
    MODEL,
    NAMES,
    OTHER_LORA_NODES,
    PINNING,
    PREFETCH,
    READ,
    REFUSALS,
    TEXT_ENCODERS,
    TEXTS,
    VERSION,
    Part,
    Reliance,
    each,
    resolve,
)


@functools.cache
def mismatches() -> Mapping[Reliance, str]:
    """What is amiss, see `Reliance.mismatch`; found out once."""
    return {reliance: found for reliance in RELIANCES if (found := reliance.mismatch())}


def describe() -> Iterator[str]:
    """One line for each mismatch, with what it costs."""
    for reliance, found in mismatches().items():
        costs = "; ".join(part.without for part in reliance.parts)
        yield f"this ComfyUI{_version()} {found}, unlike ComfyUI {reliance.seen}: {costs}."


def holds(part: Part) -> bool:
    """Whether ComfyUI has all that a part needs."""
    return not any(part in reliance.parts for reliance in mismatches())


def _version() -> str:
    try:
        return f" ({resolve('comfyui_version:__version__')})"
    except (ImportError, AttributeError):
        return ""


def _patcher_attributes(patcher: type) -> str:
    made = patcher(nn.Module(), torch.device("cpu"), torch.device("cpu"))
    needed = ("model", "load_device", "offload_device", "patches", "patches_uuid", "model_options", "object_patches",
              "injections", "forced_hooks", "weight_wrapper_patches", "hook_patches")  # fmt: skip
    lacking = [name for name in needed if not hasattr(made, name)]
    return f"has a ModelPatcher without {', '.join(lacking)}" if lacking else ""


def _weight_names(_: Any) -> str:
    """ComfyUI matches LoRA files with the weights' names of a model that it makes without weights."""
    for family, lacking in registry.nameless_weights().items():
        if lacking:
            count, first = len(lacking), lacking[0]
            return f"makes a {family} model in which {count} weights have no name, such as '{first}'"
    return ""


_PATCHER = "comfy.model_patcher:ModelPatcher"
_DEVICES = "comfy.model_management:"
_QUEUE = "server:PromptServer.instance.prompt_queue.get_current_queue_volatile"

RELIANCES: tuple[Reliance, ...] = (
    # The MODEL: what it is made of, and what ComfyUI calls on it.
    Reliance(_PATCHER, (MODEL, TEXT_ENCODERS), finds=_patcher_attributes),
    Reliance(f"{_PATCHER}.__init__", (MODEL, TEXT_ENCODERS), ("model", "load_device", "offload_device")),
    Reliance(f"{_PATCHER}.clone", (MODEL, TEXT_ENCODERS)),
    Reliance(f"{_PATCHER}.model_size", (MODEL,)),
    Reliance(f"{_PATCHER}.loaded_size", (MODEL,)),
    Reliance(f"{_PATCHER}.partially_load", (MODEL, TEXT_ENCODERS), ("device_to", "extra_memory")),
    Reliance(f"{_PATCHER}.partially_unload", (MODEL, TEXT_ENCODERS), ("device_to", "memory_to_free")),
    Reliance(f"{_PATCHER}.detach", (MODEL, TEXT_ENCODERS), ("unpatch_all",)),
    Reliance(f"{_PATCHER}.patch_model", (MODEL,), ("load_weights",)),
    Reliance(f"{_PATCHER}.unpatch_model", (MODEL, TEXT_ENCODERS), ("device_to", "unpatch_weights")),
    Reliance(f"{_PATCHER}.use_ejected", (MODEL,), ("skip_and_inject_on_exit_only",)),
    Reliance(f"{_PATCHER}.pre_run", (MODEL,)),
    Reliance(f"{_PATCHER}.cleanup", (MODEL,)),
    *each("comfy.ops:", "disable_weight_init.Linear._load_from_state_dict", (MODEL,)),
    *each(
        "comfy.patcher_extension:",
        "get_all_wrappers WrappersMP.DIFFUSION_MODEL WrapperExecutor.new_class_executor",
        (MODEL,),
        READ,
    ),
    *each(
        _DEVICES,
        "get_torch_device unet_offload_device minimum_inference_memory extra_reserved_memory current_loaded_models "
        "LoadedModel.model_loaded_memory InterruptProcessingException",
        (MODEL,),
    ),
    Reliance(f"{_DEVICES}get_free_memory", (MODEL, TEXT_ENCODERS)),
    Reliance("comfy.utils:ProgressBar.update_absolute", (MODEL, TEXT_ENCODERS)),
    # LoRAs from other nodes.
    Reliance(
        f"{_PATCHER}.add_patches", (OTHER_LORA_NODES,), ("patches", "strength_patch", "strength_model")
    ),
    Reliance("comfy.lora:model_lora_keys_unet", (OTHER_LORA_NODES,), finds=_weight_names),
    *each("comfy.weight_adapter:", "LoRAAdapter LoHaAdapter LoKrAdapter GLoRAAdapter OFTAdapter",
           (OTHER_LORA_NODES,), READ),
    Reliance("comfy_execution.utils:get_executing_context", (NAMES, TEXTS), seen=READ),
    Reliance(_QUEUE, (NAMES, PREFETCH)),
    # What the MODEL cannot do, and refuses.
    Reliance(f"{_PATCHER}.add_wrapper_with_key", (REFUSALS,), ("wrapper_type", "key", "wrapper")),
    Reliance(f"{_PATCHER}.set_injections", (REFUSALS,), ("key", "injections")),
    Reliance(f"{_PATCHER}.add_object_patch", (REFUSALS,), ("name", "obj")),
    Reliance(f"{_PATCHER}.add_hook_patches", (REFUSALS, TEXT_ENCODERS), ("hook", "patches")),
    Reliance(f"{_PATCHER}.get_key_patches", (REFUSALS,)),
    Reliance(f"{_PATCHER}.state_dict_for_saving", (REFUSALS,)),
    # Text encoders.
    Reliance("comfy.lora:model_lora_keys_clip", (CLIP_LORAS,), ("model", "key_map")),
    Reliance("comfy.lora:load_lora", (CLIP_LORAS,), ("lora", "to_load")),
    Reliance("comfy.sd:CLIP.add_patches", (CLIP_LORAS,), ("patches", "strength_patch")),
    Reliance("comfy.sd:CLIP", (TEXT_ENCODERS,), ("no_init",)),
    Reliance("comfy.sd:CLIP.encode_from_tokens", (TEXT_ENCODERS,), ("tokens", "return_pooled", "return_dict")),
    *each("comfy.sd:CLIP.", "clone add_hooks_to_dict get_sd get_key_patches", (TEXT_ENCODERS,)),
    *each("comfy.sd1_clip:SDClipModel.", "encode_token_weights set_clip_options reset_clip_options", (TEXT_ENCODERS,)),
    *each("comfy.hooks:", "EnumHookMode.MinVram", (TEXT_ENCODERS,), READ),
    *each(f"{_PATCHER}.", "load patch_weight_to_device", (TEXT_ENCODERS,)),
    Reliance("comfy.lora:calculate_weight", (TEXT_ENCODERS,), ("patches", "weight", "key", "intermediate_dtype")),
    *each(
        _DEVICES,
        "text_encoder_device text_encoder_offload_device intermediate_device supports_cast is_device_cpu "
        "is_device_cuda get_total_memory throw_exception_if_processing_interrupted",
        (TEXT_ENCODERS,),
    ),
    # What is only told, or only saves time.
    Reliance("server:PromptServer.instance.send_progress_text", (TEXTS,), ("text", "node_id")),
    Reliance(f"{_DEVICES}MAX_PINNED_MEMORY", (PINNING,)),
    Reliance("comfyui_version:__version__", (VERSION,)),
    *registry.reliances(),
)
