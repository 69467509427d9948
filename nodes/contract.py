"""What the pack relies on in ComfyUI, by name: checked once at the start, part by part.

A version of ComfyUI that lacks something costs the part that needs it, and one line in the log says which. Nothing here
is imported before it is checked, so that this module loads in every version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Where a thing was last seen: in whole trees, in which this pack ran (0.18.2, 0.24.0, 0.27.0, 0.30.0); in a whole tree
# that was read; and in single files of later versions that were read.
RAN, READ, READ_FILES = "0.18.2 to 0.30", "0.18.2 to 0.33", "0.18.2 to 0.46"


@dataclass(frozen=True)
class Part:
    """A part of the pack that works, or does not, by itself.

    Attributes:
        without: what is not there when ComfyUI lacks something that it needs.
    """

    without: str


MODEL = Part("Accelerated Flux Loader and the nodes that take its model are left out")
OTHER_LORA_NODES = Part(
    "Load LoRA and the LoRA nodes of other packs do not work on the accelerated model; use Hotswap LoRA"
)
REFUSALS = Part("merging, saving, hooks or the bypass loader may fail on the accelerated model without a clear message")
CLIP_LORAS = Part("Hotswap LoRA changes no text encoder")
TEXT_ENCODERS = Part("Flux Text Encoder Loader is left out")
NAMES = Part("LoRAs that come from other nodes are named by their content, not by their file")
PREFETCH = Part("the LoRAs of queued prompts are not prepared ahead")
TEXTS = Part("nothing is written below running nodes; the log has it all the same")
PINNING = Part("host memory is not page-locked, which makes loading and offloading slower")
VERSION = Part("Flux Accel Report does not know ComfyUI's version")


@dataclass(frozen=True)
class Reliance:
    """One thing that must be there.

    Attributes:
        where: "module:name.name".
        parts: what of the pack needs it.
        takes: the names of parameters that the pack passes, or is passed by ComfyUI where it overrides a method.
        seen: the versions of ComfyUI that had it so.
        finds: what is amiss with it beyond that; None or "" where nothing is.
    """

    where: str
    parts: tuple[Part, ...]
    takes: tuple[str, ...] = ()
    seen: str = READ_FILES
    finds: Callable[[Any], str] | None = None

    def mismatch(self) -> str:
        """What is amiss, as the end of a sentence that begins with "this ComfyUI"; empty where nothing is."""
        try:
            found = _resolve(self.where)
        except (ImportError, AttributeError) as exc:
            return f"has no {self.where} ({exc})"
        lacking = _lacking(found, self.takes)
        if lacking:
            return f"has a {self.where} without {', '.join(lacking)}"
        try:
            return self.finds(found) if self.finds else ""
        except Exception as exc:  # whatever a changed class raises
            return f"has a {self.where} that cannot be used ({type(exc).__name__}: {exc})"


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


def _resolve(where: str) -> Any:
    module, _, path = where.partition(":")
    if module == "server":
        # ComfyUI imports it before any node pack. Importing it here would start another one in a process without.
        if module not in sys.modules:
            raise ImportError("it is not loaded")
        found = sys.modules[module]
    else:
        found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _lacking(found: Any, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # not written in Python
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in names if name not in parameters]


def _version() -> str:
    try:
        return f" ({_resolve('comfyui_version:__version__')})"
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
    from .skeleton import nameless_weights

    lacking = nameless_weights()
    return f"makes a FLUX model in which {len(lacking)} weights have no name, such as '{lacking[0]}'" if lacking else ""


def _each(prefix: str, names: str, parts: tuple[Part, ...], seen: str = READ_FILES) -> tuple[Reliance, ...]:
    return tuple(Reliance(prefix + name, parts, seen=seen) for name in names.split())


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
    Reliance("comfy.model_base:Flux", (MODEL,), ("model_config", "model_type")),
    Reliance("comfy.model_base:Flux.memory_required", (MODEL,), ("input_shape", "cond_shapes")),
    Reliance(
        "comfy.model_base:Flux._apply_model",
        (MODEL,),
        ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options"),
    ),
    *_each("comfy.model_base:ModelType.", "FLUX FLOW", (MODEL,)),
    *_each("comfy.supported_models:", "Flux.set_inference_dtype FluxSchnell.set_inference_dtype", (MODEL,)),
    Reliance("comfy.ldm.flux.model:Flux", (MODEL,), ("dtype", "device", "operations"), READ),
    Reliance("comfy.ldm.flux.model:FluxParams", (MODEL,), seen=READ),
    *_each("comfy.ops:", "disable_weight_init.Linear._load_from_state_dict", (MODEL,)),
    *_each(
        "comfy.patcher_extension:",
        "get_all_wrappers WrappersMP.DIFFUSION_MODEL WrapperExecutor.new_class_executor",
        (MODEL,),
        READ,
    ),
    *_each(
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
    *_each("comfy.weight_adapter:", "LoRAAdapter LoHaAdapter LoKrAdapter GLoRAAdapter OFTAdapter",
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
    *_each("comfy.sd:CLIP.", "clone add_hooks_to_dict get_sd get_key_patches", (TEXT_ENCODERS,)),
    Reliance(
        "comfy.sd1_clip:SDClipModel",
        (TEXT_ENCODERS,),
        ("device", "dtype", "max_length", "textmodel_json_config", "special_tokens", "model_class",
         "return_projected_pooled", "model_options"),
    ),
    *_each("comfy.sd1_clip:SDClipModel.", "encode_token_weights set_clip_options reset_clip_options", (TEXT_ENCODERS,)),
    *_each("comfy.text_encoders.t5:", "T5", (TEXT_ENCODERS,), RAN),
    *_each("comfy.clip_model:", "CLIPTextModel", (TEXT_ENCODERS,), RAN),
    Reliance("comfy.text_encoders.flux:FluxTokenizer", (TEXT_ENCODERS,), ("embedding_directory", "tokenizer_data")),
    *_each("comfy.hooks:", "EnumHookMode.MinVram", (TEXT_ENCODERS,), READ),
    *_each(f"{_PATCHER}.", "load patch_weight_to_device", (TEXT_ENCODERS,)),
    Reliance("comfy.lora:calculate_weight", (TEXT_ENCODERS,), ("patches", "weight", "key", "intermediate_dtype")),
    *_each(
        _DEVICES,
        "text_encoder_device text_encoder_offload_device intermediate_device supports_cast is_device_cpu "
        "is_device_cuda get_total_memory throw_exception_if_processing_interrupted",
        (TEXT_ENCODERS,),
    ),
    # What is only told, or only saves time.
    Reliance("server:PromptServer.instance.send_progress_text", (TEXTS,), ("text", "node_id")),
    Reliance(f"{_DEVICES}MAX_PINNED_MEMORY", (PINNING,)),
    Reliance("comfyui_version:__version__", (VERSION,)),
)
