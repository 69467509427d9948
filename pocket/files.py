"""The files of Pocket FLUX: their names, and how they are read and written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

from harness.paths import REPO

from . import autoencoder, model, text
from .loras import Recipe

MODELS = REPO / "pocket" / "models"
NAMES = {
    "model": "diffusion_models/pocket-flux.safetensors",
    "text": "text_encoders/pocket-t5.safetensors",
    "vae": "vae/pocket-vae.safetensors",
}


def lora_path(models: Path, recipe: Recipe) -> Path:
    """Where a LoRA is."""
    return models / "loras" / recipe.file


def load_trained(models: Path) -> tuple[nn.Module, text.T5]:
    """The transformer and the T5 from their files, computing in float32."""
    transformer, encoder = model.build(0), text.T5()
    model.load(transformer, load_file(models / NAMES["model"]))
    encoder.load_state_dict({name: value.float() for name, value in load_file(models / NAMES["text"]).items()})
    return transformer.requires_grad_(False), encoder.requires_grad_(False)


def load_decoder(models: Path) -> nn.Module:
    """The decoder from its file, without the channels that are zero."""
    decoder, tensors = autoencoder.Decoder(), load_file(models / NAMES["vae"])
    state = {
        name: tensors[f"taesd_decoder.{name}"].float()[tuple(slice(size) for size in value.shape)]
        for name, value in decoder.state_dict().items()
    }
    decoder.load_state_dict(state)
    return decoder.requires_grad_(False)


def tokenizer_of_comfyui() -> text.Tokenizer:
    """The tokenizer that ComfyUI brings; downloads ComfyUI if it is not there."""
    from harness.comfyui import fetch

    return text.Tokenizer(fetch() / "comfy" / "text_encoders" / "t5_tokenizer")


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
