"""The node that makes a CLIP from a T5 and a CLIP-L file."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ....accel.checkpoint import read_file
from ....accel.hardware import hardware_of
from ....accel.quantize.bitsandbytes_modes import NF4
from ....accel.registry import TEXT_ENCODERS
from ....accel.text_encoder.modes import MODES, check_mode, choose_mode
from ....accel.text_encoder.spec import EncoderSpec, check_not_swapped, clip_spec, t5_spec
from ...files import CATEGORY, find_file, fingerprint
from ...progress import say
from .clip import FluxClip

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
            description="Loads FLUX's two text encoders, the T5 in as few bytes as you choose. Use it in place of "
            "DualCLIPLoader. Prompts that were encoded before need no text encoder in memory.",
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=files,
                    tooltip="A T5 v1.1 encoder in models/text_encoders: safetensors (fp32, fp16, bf16, fp8, scaled "
                    "fp8) or GGUF.",
                ),
                io.Combo.Input(
                    "clip_l_name",
                    options=[*files, NONE],
                    tooltip="A CLIP-L text encoder in models/text_encoders. none: the pooled text vector is zero.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(MODES),
                    default="auto",
                    tooltip="How the T5 is kept in memory. none: as the file has it. int8, fp8: half of bf16. nf4: a "
                    "quarter (needs bitsandbytes). auto: none, int8 or nf4, the first that takes at most half of the "
                    "memory.",
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
        t5, clip = _specs(t5_name, clip_l_name)
        key = t5.file.identity, clip and clip.file.identity, quantization, str(device)
        return io.NodeOutput(TEXT_ENCODERS.get_or_build(key, lambda: _clip(t5, clip, quantization, device)).clone())


def _specs(t5_name: str, clip_l_name: str) -> tuple[EncoderSpec, EncoderSpec | None]:
    """Recognise both files by their headers.

    Raises:
        FileError: one is not there.
        CheckpointError: one is another model, or they are in each other's place.
    """
    paths = [None if name == NONE else find_file(FOLDER, name) for name in (t5_name, clip_l_name)]
    t5_file, clip_file = (path and read_file(path) for path in paths)
    check_not_swapped(t5_file, clip_file)
    return t5_spec(t5_file), clip_file and clip_spec(clip_file)


def _clip(t5: EncoderSpec, clip: EncoderSpec | None, quantization: str, device: torch.device) -> FluxClip:
    return FluxClip(
        t5,
        clip,
        _mode(quantization, t5, device),
        device,
        comfy.model_management.text_encoder_offload_device(),
        folder_paths.get_folder_paths("embeddings"),
    )


def _mode(quantization: str, t5: EncoderSpec, device: torch.device) -> str:
    """What `auto` is here, said to the user."""
    if quantization != "auto":
        return quantization
    on_cpu = comfy.model_management.is_device_cpu(device)
    measure = comfy.model_management.get_free_memory if on_cpu else comfy.model_management.get_total_memory
    where = "free RAM" if on_cpu else "GPU memory"
    mode, reason = choose_mode(t5, measure(device), where, bitsandbytes=NF4.missing(hardware_of(device)) is None)
    say(f"T5 quantization auto: {mode} ({reason})")
    return mode


def _filenames() -> list[str]:
    """The files of ComfyUI's list, and GGUF files, which it leaves out."""
    names = set(folder_paths.get_filename_list(FOLDER))
    for folder in folder_paths.get_folder_paths(FOLDER):
        found, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        names.update(folder_paths.filter_files_extensions(found, [".gguf"]))
    return sorted(names)
