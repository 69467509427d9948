"""Three LoRAs, trained with PEFT and saved in the formats that trainers write.

| style | rank | on | names |
| --- | --- | --- | --- |
| outline | 8, alpha 4 | every linear of the blocks | kohya-ss/sd-scripts, with alpha |
| neon | 16 | attention and modulation | diffusers / PEFT |
| stripes | 4 | every linear of the blocks | ComfyUI's own |

Outline and stripes are also trained on top of neon, so that they show in the dark too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from accel.families.flux1.layout import checkpoint_layout
from accel.families.layout import FusedLinear

from .model import CONFIG

BLOCKS = r".*transformer_blocks\.\d+\."
EVERYTHING = BLOCKS + (
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
    r"|norm(1|1_context)?\.linear|proj_mlp|proj_out)"
)
ATTENTION = BLOCKS + r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm(1|1_context)?\.linear|proj_out)"


@dataclass(frozen=True)
class Recipe:
    """One LoRA.

    Attributes:
        style: of the pictures that it is trained on.
        file: its name.
        rank: of every layer.
        alpha: the update is scaled by alpha / rank.
        target: which of diffusers' modules it is on, a regular expression.
        fused: whether layers that the original model fuses share one update, as trainers on the original model have it.
        learning_rate: of AdamW.
        length: how many times as many steps as the plan says.
        over: style of another LoRA, or "". Every other step is taken with it in the weights, on pictures in both
            styles: so the two go together.
        metadata: of the file.
    """

    style: str
    file: str
    rank: int
    alpha: float
    target: str
    fused: bool
    learning_rate: float = 6e-3
    length: int = 1
    over: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


RECIPES = (
    Recipe(
        "outline",
        "pocket-outline-kohya.safetensors",
        rank=8,
        alpha=4.0,
        target=EVERYTHING,
        fused=True,
        length=4,
        over="neon",
        metadata={"ss_network_module": "networks.lora_flux", "ss_network_dim": "8", "ss_network_alpha": "4"},
    ),
    Recipe(
        "neon",
        "pocket-neon-diffusers.safetensors",
        rank=16,
        alpha=16.0,
        target=ATTENTION,
        fused=False,
        metadata={"format": "pt"},
    ),
    Recipe(
        "stripes",
        "pocket-stripes-comfyui.safetensors",
        rank=4,
        alpha=4.0,
        target=EVERYTHING,
        fused=True,
        length=2,
        over="neon",
    ),
)


def attach(transformer: nn.Module, recipe: Recipe, seed: int) -> None:
    """Put PEFT's LoRA layers on the transformer, and tie what the format shares."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.target)
    inject_adapter_in_model(config, transformer)
    if recipe.fused:
        for linear in _linears(transformer):
            first = _layer(transformer, linear.parts[0].module)
            for part in linear.parts[1:]:
                _layer(transformer, part.module).lora_A["default"].weight = first.lora_A["default"].weight


def merge(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Add a LoRA with alpha = rank to the transformer's weights, from a file in diffusers' format."""
    with torch.no_grad():
        for name, lora_A in tensors.items():
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            if name.endswith(".lora_A.weight"):
                lora_B = tensors[f"transformer.{module}.lora_B.weight"]
                transformer.get_submodule(module).weight += lora_B.float() @ lora_A.float()


def share(first: nn.Module, second: nn.Module) -> None:
    """Give the second transformer the first one's LoRA parameters; both have the same layers."""
    for name, module in first.named_modules():
        if hasattr(module, "lora_A"):
            other = second.get_submodule(name)
            other.lora_A["default"].weight = module.lora_A["default"].weight
            other.lora_B["default"].weight = module.lora_B["default"].weight


def checkpoint(transformer: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The file, in bfloat16."""
    write: Mapping[str, Callable[[nn.Module, Recipe], Iterator[tuple[str, Tensor]]]] = {
        "outline": _kohya,
        "neon": _diffusers,
        "stripes": _comfyui,
    }
    return {name: value.detach().bfloat16().contiguous() for name, value in write[recipe.style](transformer, recipe)}


def _kohya(transformer: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    for linear in _linears(transformer):
        name = "lora_unet_" + linear.name.replace(".", "_")
        lora_A, lora_B = _fused(transformer, linear)
        yield f"{name}.lora_down.weight", lora_A
        yield f"{name}.lora_up.weight", lora_B
        yield f"{name}.alpha", torch.tensor(recipe.alpha)


def _comfyui(transformer: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    for linear in _linears(transformer):
        lora_A, lora_B = _fused(transformer, linear)
        yield f"diffusion_model.{linear.name}.lora_A.weight", lora_A
        yield f"diffusion_model.{linear.name}.lora_B.weight", lora_B


def _diffusers(transformer: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    from peft import get_peft_model_state_dict

    for name, value in get_peft_model_state_dict(transformer).items():
        yield "transformer." + re.sub(r"^base_model\.model\.", "", name), value


def _linears(transformer: nn.Module) -> list[FusedLinear]:
    """The original model's linears that have a LoRA."""
    layout = checkpoint_layout(CONFIG)
    return [linear for linear in layout.linears if hasattr(_layer(transformer, linear.parts[0].module), "lora_A")]


def _layer(transformer: nn.Module, module: str) -> nn.Module:
    return transformer.get_submodule(module)


def _fused(transformer: nn.Module, linear: FusedLinear) -> tuple[Tensor, Tensor]:
    layers = [_layer(transformer, part.module) for part in linear.parts]
    lora_B = torch.cat([layer.lora_B["default"].weight for layer in layers])
    return layers[0].lora_A["default"].weight, lora_B
