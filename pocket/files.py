"""The files of the pocket models: how they are read and written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

from harness.paths import REPO

from . import model
from .autoencoder import DECODER
from .kind import Kind, Tokenizer
from .loras import Recipe

MODELS = REPO / "pocket" / "models"


def names(kind: Kind) -> list[str]:
    """Of all its files, in a folder of models."""
    return [*kind.files.values(), *(f"loras/{recipe.file}" for recipe in kind.recipes)]


def lora_path(models: Path, recipe: Recipe) -> Path:
    """Where a LoRA is."""
    return models / "loras" / recipe.file


def load_trained(kind: Kind, models: Path) -> tuple[nn.Module, nn.Module]:
    """The transformer and the text encoder from their files, computing in float32."""
    transformer, encoder = model.build(kind.transformer, 0), kind.text.load(load_file(models / kind.files["text"]))
    model.load(kind.transformer, transformer, load_file(models / kind.files["model"]))
    return transformer.requires_grad_(False), encoder.requires_grad_(False)


def load_decoder(kind: Kind, models: Path) -> nn.Module:
    """The decoder from its file, without the channels that are zero."""
    decoder, tensors = kind.latents.decoder(), load_file(models / kind.files["vae"])
    state = {
        name: tensors[f"{DECODER}{name}"].float()[tuple(slice(size) for size in value.shape)]
        for name, value in decoder.state_dict().items()
    }
    decoder.load_state_dict(state)
    return decoder.requires_grad_(False)


def tokenizer_of_comfyui(kind: Kind) -> Tokenizer:
    """The tokenizer that ComfyUI brings; downloads ComfyUI if it is not there."""
    from harness.comfyui import fetch

    return kind.text.tokenizer(fetch() / "comfy" / "text_encoders" / kind.text.folder)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; equal tensors and metadata give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if metadata:
        # safetensors 0.8.0 writes them in a hash map's order, another one each time.
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(start - 8)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data[:8] + text + data[start:])
    os.replace(partial, path)
