"""API-format graphs for tests and benchmarks: the same picture through our nodes or through ComfyUI's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from .client import Client
from .prompt_result import PromptResult

Graph = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """What one sampling should draw.

    Attributes:
        loras: (file, strength), first applied first.
        guidance: what FluxGuidance sets; None leaves the node out.
        empty: the node that makes the latent, of as many channels as the model reads.
    """

    model: str = "tiny-flux-dev-fp32.safetensors"
    loras: Sequence[tuple[str, float]] = ()
    prompt: str = "a red circle on a blue square"
    negative: str = ""
    seed: int = 1
    steps: int = 4
    cfg: float = 1.0
    width: int = 64
    height: int = 64
    batch: int = 1
    guidance: float | None = 3.5
    empty: str = "EmptySD3LatentImage"
    dtype: str = "auto"
    compile: str = "off"
    stock: bool = False
    decode: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def graph(*pictures: Picture) -> Graph:
    """One graph that draws every picture; each has nodes of its own, except equal loaders, which ComfyUI joins."""
    nodes: Graph = {
        "clip": node("CLIPLoader", clip_name="tiny-clip-l.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name="tiny-taesd.safetensors"),
    }
    for index, picture in enumerate(pictures):
        _add(nodes, f"p{index}_", picture)
    return nodes


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API graph; a link is `[node id, output index]`."""
    return {"class_type": class_type, "inputs": inputs}


def latents(client: Client, result: PromptResult, index: int = 0) -> torch.Tensor:
    """The final latent of picture `index`, (B, 16, h, w) float32."""
    entry = result.outputs[f"p{index}_latent"]["latents"][0]
    return load_safetensors(client.view(**entry))["latent_tensor"]


def relative_distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance, |ours - reference| / |reference|."""
    return float((ours - reference).norm() / reference.norm())


def _add(nodes: Graph, prefix: str, picture: Picture) -> None:
    def link(name: str, output: int = 0) -> list[Any]:
        return [prefix + name, output]

    model = _add_model(nodes, prefix, picture)
    nodes[prefix + "positive"] = node("CLIPTextEncode", clip=["clip", 0], text=picture.prompt)
    nodes[prefix + "negative"] = node("CLIPTextEncode", clip=["clip", 0], text=picture.negative)
    positive, negative = link("positive"), link("negative")
    if picture.guidance is not None:
        nodes[prefix + "guidance"] = node("FluxGuidance", conditioning=positive, guidance=picture.guidance)
        nodes[prefix + "guidance_negative"] = node("FluxGuidance", conditioning=negative, guidance=picture.guidance)
        positive, negative = link("guidance"), link("guidance_negative")
    size = {"width": picture.width, "height": picture.height}
    nodes[prefix + "empty"] = node(picture.empty, **size, batch_size=picture.batch)
    nodes[prefix + "sample"] = node(
        "KSampler",
        model=model,
        seed=picture.seed,
        steps=picture.steps,
        cfg=picture.cfg,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=negative,
        latent_image=link("empty"),
        denoise=1.0,
    )
    nodes[prefix + "latent"] = node("SaveLatent", samples=link("sample"), filename_prefix="latents/test")
    if picture.decode:
        nodes[prefix + "decoded"] = node("VAEDecode", samples=link("sample"), vae=["vae", 0])
        nodes[prefix + "image"] = node("SaveImage", images=link("decoded"), filename_prefix="test")


def _add_model(nodes: Graph, prefix: str, picture: Picture) -> list[Any]:
    if picture.stock:
        nodes[prefix + "model"] = node("UNETLoader", unet_name=picture.model, weight_dtype="default")
    else:
        nodes[prefix + "model"] = node(
            "FluxAccelLoader", model_name=picture.model, dtype=picture.dtype, attention="auto", compile=picture.compile
        )
    model = [prefix + "model", 0]
    for number, (name, strength) in enumerate(picture.loras):
        key = f"{prefix}lora{number}"
        if picture.stock:
            nodes[key] = node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
        else:
            nodes[key] = node("FluxHotswapLora", model=model, lora_name=name, strength=strength, **picture.extra)
        model = [key, 0]
    return model
