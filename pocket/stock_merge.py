"""LoRAs on float8 weights: beside the weights, as this pack computes them, or merged into them, as ComfyUI does.

Both draw in a real ComfyUI from the same float8 file. The reference is the same weights and LoRA in float32, unmerged.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from harness.client import Client
from harness.graphs import Graph, node
from harness.server import ComfyServer

from . import measure
from .draw import SIZE_PX, Pixels
from .files import write
from .flux1 import FLUX1
from .loras import Recipe
from .quality import Request, effects
from .sheet import STEPS

FP8 = "pocket-flux-fp8.safetensors"


def evaluate_merge(models: Path, requests: Sequence[Request]) -> dict[str, Any]:
    """PSNR against the reference, and the LoRA's effect, of both ways, for each LoRA."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        original = load_file(models / FLUX1.files["model"])
        rounded = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in original.items()}
        write(Path(folder) / "models" / "diffusion_models" / FP8, rounded)
        with ComfyServer(folder) as server, server.client() as client:
            plain = _draw(client, requests, _ours("fp32"), None)
            for recipe in FLUX1.recipes:
                reference = _draw(client, requests, _ours("fp32"), recipe)
                for name, loader in (("ours", _ours("bf16")), ("ComfyUI's merge", _stock())):
                    drawn = _draw(client, requests, loader, recipe)
                    result.setdefault(recipe.style, {})[name] = {
                        "psnr_db": measure.psnr(drawn, reference),
                        "effect": effects(drawn, plain)[recipe.style],
                    }
    return result


def _ours(dtype: str) -> dict[str, Any]:
    return node("FluxAccelLoader", model_name=FP8, dtype=dtype, attention="auto", compile="off")


def _stock() -> dict[str, Any]:
    return node("UNETLoader", unet_name=FP8, weight_dtype="fp8_e4m3fn")


def _draw(client: Client, requests: Sequence[Request], loader: dict[str, Any], recipe: Recipe | None) -> list[Pixels]:
    graph: Graph = {
        "model": loader,
        "clip": node(
            "FluxTextEncoderLoader", t5_name=Path(FLUX1.files["text"]).name, clip_l_name="none", quantization="none"
        ),
        "vae": node("VAELoader", vae_name=Path(FLUX1.files["vae"]).name),
        "empty": node("EmptySD3LatentImage", width=SIZE_PX, height=SIZE_PX, batch_size=1),
    }
    model = ["model", 0]
    if recipe is not None:
        stock = loader["class_type"] == "UNETLoader"
        graph["lora"] = (
            node("LoraLoaderModelOnly", model=model, lora_name=recipe.file, strength_model=1.0)
            if stock
            else node("FluxHotswapLora", model=model, lora_name=recipe.file, strength=1.0)
        )
        model = ["lora", 0]
    for index, request in enumerate(requests):
        graph[f"text{index}"] = node("CLIPTextEncode", clip=["clip", 0], text=request.prompt)
        graph[f"sample{index}"] = node(
            "KSampler",
            model=model,
            seed=request.seed,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=[f"text{index}", 0],
            negative=[f"text{index}", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        )
        graph[f"decoded{index}"] = node("VAEDecode", samples=[f"sample{index}", 0], vae=["vae", 0])
        graph[f"image{index}"] = node("SaveImage", images=[f"decoded{index}", 0], filename_prefix="merge")
    result = client.run(graph, check=True)
    pictures = []
    for index in range(len(requests)):
        data = client.view(**result.outputs[f"image{index}"]["images"][0])
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255.0
        pictures.append(pixels)
    return pictures
