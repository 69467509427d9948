"""LoRAs, trained with PEFT and saved in the formats that trainers write.

| format | names | layers that the original model fuses |
| --- | --- | --- |
| kohya | kohya-ss/sd-scripts, with alpha | share one update |
| comfyui | ComfyUI's own | share one update |
| diffusers | diffusers / PEFT | are apart, but for those that diffusers fuses too |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from accel.families.layout import FusedLinear, Layout

KOHYA, COMFYUI, DIFFUSERS = "kohya", "comfyui", "diffusers"
BLOCKS = r".*transformer_blocks\.\d+\."


@dataclass(frozen=True)
class Recipe:
    """One LoRA.

    Attributes:
        style: of the pictures that it is trained on.
        file: its name.
        format: see above.
        layout: the model's, which says what is fused in that format.
        rank: of every layer.
        alpha: the update is scaled by alpha / rank.
        target: which of diffusers' modules it is on, a regular expression.
        learning_rate: of AdamW.
        length: how many times as many steps as the plan says.
        over: style of another LoRA, or "". Every other step is taken with it in the weights, on pictures in both
            styles: so the two go together.
        metadata: of the file.
    """

    style: str
    file: str
    format: str
    layout: Layout
    rank: int
    alpha: float
    target: str
    learning_rate: float = 6e-3
    length: int = 1
    over: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def attach(transformer: nn.Module, recipe: Recipe, seed: int) -> None:
    """Put PEFT's LoRA layers on the transformer, and tie what the format shares."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.target)
    inject_adapter_in_model(config, transformer)
    for linear in _linears(transformer, recipe):
        first = _layer(transformer, linear.parts[0].module)
        for part in linear.parts[1:]:
            _layer(transformer, part.module).lora_A["default"].weight = first.lora_A["default"].weight


def merge(transformer: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    """Add a LoRA with alpha = rank to the transformer's weights, from its file in diffusers' format."""
    with torch.no_grad():
        for linear in recipe.layout.linears:
            name = f"transformer.{linear.name}"
            if f"{name}.lora_A.weight" in tensors:
                lora_A, lora_B = (tensors[f"{name}.lora_{half}.weight"].float() for half in "AB")
                for part in linear.parts:
                    rows = lora_B[part.start : part.start + part.rows]
                    transformer.get_submodule(part.module).weight += rows @ lora_A


def share(first: nn.Module, second: nn.Module) -> None:
    """Give the second transformer the first one's LoRA parameters; both have the same layers."""
    for name, module in first.named_modules():
        if hasattr(module, "lora_A"):
            other = second.get_submodule(name)
            other.lora_A["default"].weight = module.lora_A["default"].weight
            other.lora_B["default"].weight = module.lora_B["default"].weight


def checkpoint(transformer: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The file, in bfloat16."""
    return {name: value.detach().bfloat16().contiguous() for name, value in _tensors(transformer, recipe)}


def _tensors(transformer: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    for linear in _linears(transformer, recipe):
        lora_A, lora_B = _fused(transformer, linear)
        if recipe.format == KOHYA:
            name = "lora_unet_" + linear.name.replace(".", "_")
            yield f"{name}.lora_down.weight", lora_A
            yield f"{name}.lora_up.weight", lora_B
            yield f"{name}.alpha", torch.tensor(recipe.alpha)
        else:
            name = {COMFYUI: "diffusion_model.", DIFFUSERS: "transformer."}[recipe.format] + linear.name
            yield f"{name}.lora_A.weight", lora_A
            yield f"{name}.lora_B.weight", lora_B


def _linears(transformer: nn.Module, recipe: Recipe) -> list[FusedLinear]:
    """The linears of the recipe's layout that have a LoRA."""
    return [
        linear
        for linear in recipe.layout.linears
        if hasattr(_layer(transformer, linear.parts[0].module), "lora_A")
    ]


def _layer(transformer: nn.Module, module: str) -> nn.Module:
    return transformer.get_submodule(module)


def _fused(transformer: nn.Module, linear: FusedLinear) -> tuple[Tensor, Tensor]:
    layers = [_layer(transformer, part.module) for part in linear.parts]
    lora_B = torch.cat([layer.lora_B["default"].weight for layer in layers])
    return layers[0].lora_A["default"].weight, lora_B
