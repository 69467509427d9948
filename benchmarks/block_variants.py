"""The blocks of FLUX.1 that benchmarks compile: bare ones, ours with LoRA layers, PEFT's."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accel.families.flux1 import Flux1, Flux1Config
from accel.linear.inputs import NONE, Activation, Columns, Input, as_input
from accel.quantize import find_mode

from .flux_loras import block_linears

PEFT_ADAPTER = "default"


def one_of_each(hidden_size: int) -> Flux1Config:
    """FLUX.1 of some width, with one double and one single block, and nothing large around them."""
    return Flux1Config(hidden_size, 1, 1, 64, 64, 256, 256, 4 * hidden_size, True)


def block_modules(config: Flux1Config) -> list[str]:
    """Names of all linears inside the blocks: those a LoRA of the benchmarks is on."""
    return [module for module, _, _ in block_linears(Flux1().layout(config))]


def without_lora_layers(function: Callable) -> Callable:
    """A block function, to be run over a block whose linears are bare: each is called by itself.

    The function's code is the same; only the names of what runs linears mean something else to it.
    """

    def linears(x: Tensor | Input, *layers: nn.Module, activation: Activation = NONE) -> list[Any]:
        value = as_input(x).value()
        outputs = [layer(value) for layer in layers]
        return outputs if activation == NONE else [*outputs[:-1], Columns((outputs[-1],), activation)]

    def joint_linears(text: Input, image: Input, text_layers: Any, image_layers: Any) -> list[Tensor]:
        pairs = zip(linears(text, *text_layers), linears(image, *image_layers), strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    def split_linears(joint: Tensor, tokens: int, text_layer: nn.Module, image_layer: nn.Module) -> list[Tensor]:
        return [text_layer(joint[:, :tokens]), image_layer(joint[:, tokens:])]

    def feed_forward(x: Input, module: nn.Module) -> Tensor:
        return module(x.value())

    names = {
        **function.__globals__,
        "linears": linears,
        "joint_linears": joint_linears,
        "split_linears": split_linears,
        "_feed_forward": feed_forward,
    }
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def add_peft(model: nn.Module, config: Flux1Config, rank: int) -> None:
    """Have PEFT inject LoRA layers on all linears inside the blocks; its lora_B are zeros."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=block_modules(config))
    inject_adapter_in_model(lora, model, PEFT_ADAPTER)
    model.eval().requires_grad_(False)


def quantize_blocks(model: nn.Module, config: Flux1Config, mode: str) -> None:
    """Convert all linears inside the blocks as the engine does while it loads."""
    convert, linears = find_mode(mode).convert, Flux1().layout(config).by_module
    for name in block_modules(config):
        linear = model.get_submodule(name)
        model.set_submodule(name, convert(linear.weight, linear.bias, linears[name].per_picture).eval())


def quantize_float8(linear: nn.Linear) -> None:
    """Give a linear the weight of torchao's `Float8DynamicActivationFloat8WeightConfig(PerRow())`, also on a CPU.

    The configuration itself refuses a machine without a GPU that has float8.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs

    # TORCH: what "auto" chooses where only torch's own kernels are installed.
    options: dict[str, Any] = {"kernel_preference": KernelPreference.TORCH}
    weight = Float8Tensor.from_hp(
        linear.weight,
        float8_dtype=torch.float8_e4m3fn,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow(), **options),
        **options,
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
