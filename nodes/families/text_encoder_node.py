"""The node that makes a CLIP from text encoder files: a T5 and a CLIP-L, or a language model."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ...accel.checkpoint import read_file
from ...accel.checkpoint.source import Checkpoint
from ...accel.errors import SettingsError
from ...accel.hardware import hardware_of
from ...accel.quantize.bitsandbytes_modes import NF4
from ...accel.registry import TEXT_ENCODERS
from ...accel.text_encoder.config import LlmConfig
from ...accel.text_encoder.modes import MODES, check_mode, choose_mode
from ...accel.text_encoder.recognise import check_not_swapped, clip_spec, encoder_spec
from ...accel.text_encoder.spec import EncoderSpec
from .. import contract
from ..clip import RememberingClip
from ..files import CATEGORY, find_file, fingerprint
from ..progress import say
from .flux1.clip import FluxClip
from .flux2.contract import TEXT_ENCODERS as LANGUAGE_MODELS

FOLDER = "text_encoders"
NONE = "none"


class FluxTextEncoderLoader(io.ComfyNode):
    """Flux Text Encoder Loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        files = _filenames()
        return io.Schema(
            node_id="FluxTextEncoderLoader",
            display_name="Flux Text Encoder Loader",
            category=CATEGORY,
            description="Loads FLUX's text encoders in as few bytes as you choose: FLUX.1's T5 and CLIP-L, or FLUX.2's "
            "Qwen3 or Mistral. Use it in place of DualCLIPLoader and CLIPLoader. Prompts that were encoded before need "
            "no text encoder in memory.",
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=files,
                    tooltip="The large text encoder in models/text_encoders: safetensors (fp32, fp16, bf16, fp8, "
                    "scaled fp8) or GGUF. FLUX.1: a T5 v1.1. FLUX.2 klein 4B: Qwen3-4B. klein 9B: Qwen3-8B. dev: "
                    "Mistral Small 24B.",
                ),
                io.Combo.Input(
                    "clip_l_name",
                    options=[*files, NONE],
                    tooltip="FLUX.1: a CLIP-L text encoder in models/text_encoders. none: the pooled text vector is "
                    "zero. FLUX.2: none, it has one text encoder.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(MODES),
                    default="auto",
                    tooltip="How the large text encoder is kept in memory. none: as the file has it. int8, fp8: half "
                    "of bf16. nf4: a quarter (needs bitsandbytes). auto: none, int8 or nf4, the first that takes at "
                    "most half of the memory.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name: str, clip_l_name: str, **_: str) -> tuple[tuple[int, int], ...]:
        """Run again when a file changes."""
        return tuple(fingerprint(FOLDER, name) for name in (t5_name, clip_l_name) if name != NONE)

    @classmethod
    def execute(cls, t5_name: str, clip_l_name: str, quantization: str) -> io.NodeOutput:
        """Read the headers, and hand out a clone of the CLIP that lives in the registry."""
        device = comfy.model_management.text_encoder_device()
        check_mode(quantization, device)
        main, clip = _specs(t5_name, clip_l_name)
        key = main.file.identity, clip and clip.file.identity, quantization, str(device)
        return io.NodeOutput(TEXT_ENCODERS.get_or_build(key, lambda: _clip(main, clip, quantization, device)).clone())


def _specs(t5_name: str, clip_l_name: str) -> tuple[EncoderSpec, EncoderSpec | None]:
    """Recognise both files by their headers.

    Raises:
        FileError: one is not there.
        CheckpointError: one is another model, or they are in each other's place.
        SettingsError: the first needs no second.
    """
    main_file, clip_file = (None if name == NONE else _read(name) for name in (t5_name, clip_l_name))
    check_not_swapped(main_file, clip_file)
    main = encoder_spec(main_file)
    if isinstance(main.config, LlmConfig) and clip_file is not None:
        # Not passed over: whoever chose a T5 here, or a CLIP-L, expects FLUX.1, and would learn it from a matrix size.
        raise SettingsError(
            f"clip_l_name is '{clip_l_name}', expected '{NONE}': '{t5_name}' is {main.config.model}, and FLUX.2 has "
            "that one text encoder. For FLUX.1, choose a T5 v1.1 as t5_name."
        )
    return main, clip_file and clip_spec(clip_file)


def _read(name: str) -> Checkpoint:
    return read_file(find_file(FOLDER, name))


def _clip(main: EncoderSpec, clip: EncoderSpec | None, quantization: str, device: torch.device) -> RememberingClip:
    mode = _mode(quantization, main, device)
    places = device, comfy.model_management.text_encoder_offload_device(), folder_paths.get_folder_paths("embeddings")
    if not isinstance(main.config, LlmConfig):
        return FluxClip(main, clip, mode, *places)
    if not contract.holds(LANGUAGE_MODELS):
        raise SettingsError(
            f"'{main.file.name}' is a text encoder of FLUX.2, for which this ComfyUI lacks what the log names at its "
            "start. Update ComfyUI."
        )
    from .flux2.clip import Flux2Clip  # not every version of ComfyUI has what it imports

    say(describe(main.config))
    return Flux2Clip(main, mode, *places)


def describe(config: LlmConfig) -> str:
    """Which transformer a language model's hidden states are for, as far as its width says."""
    model, width = config.model, config.hidden_size
    known = ", ".join(f"{name} {size}" for size, name in model.serves.items())
    serves = model.serves.get(width)
    return f"Text encoder: {model.name} of width {width}, " + (f"for {serves}" if serves else f"unlike {known}")


def _mode(quantization: str, main: EncoderSpec, device: torch.device) -> str:
    """What `auto` is here, said to the user."""
    if quantization != "auto":
        return quantization
    on_cpu = comfy.model_management.is_device_cpu(device)
    measure = comfy.model_management.get_free_memory if on_cpu else comfy.model_management.get_total_memory
    where = "free RAM" if on_cpu else "GPU memory"
    mode, reason = choose_mode(main, measure(device), where, bitsandbytes=NF4.missing(hardware_of(device)) is None)
    say(f"{main.config.title} quantization auto: {mode} ({reason})")
    return mode


def _filenames() -> list[str]:
    """The files of ComfyUI's list, and GGUF files, which it leaves out."""
    names = set(folder_paths.get_filename_list(FOLDER))
    for folder in folder_paths.get_folder_paths(FOLDER):
        found, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        names.update(folder_paths.filter_files_extensions(found, [".gguf"]))
    return sorted(names)
