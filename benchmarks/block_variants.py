"""The blocks that benchmarks compile: bare ones, ours with LoRA layers, PEFT's."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel.linear.inputs import NONE, Activation, Columns, Input, as_input
from accel.quantize import find_mode

from .families.base import Config
from .families.registry import of
from .flux_loras import linears_in_blocks

PEFT_ADAPTER = "default"
# Part of the names of modules in which a family's functions are.
FAMILIES = "accel.families."


def block_modules(config: Config) -> list[str]:
    """Names of all linears inside the blocks, as the model here has them: those a LoRA of the benchmarks is on."""
    return [part.module for linear in linears_in_blocks(of(config).family.layout(config)) for part in linear.parts]


def diffusers_modules(config: Config) -> list[str]:
    """The same as diffusers' own model has them."""
    return [linear.name for linear in linears_in_blocks(of(config).diffusers_layout(config))]


def without_lora_layers(function: types.FunctionType) -> types.FunctionType:
    """A family's region or block function, to be run over a block whose linears are bare: each is called by itself.

    The code of the function is the same, and that of a family's other functions that it calls; only the names of what
    runs linears mean something else to it.
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

    return _with(function, {"linears": linears, "joint_linears": joint_linears, "split_linears": split_linears})


def _with(function: types.FunctionType, others: Mapping[str, Callable]) -> types.FunctionType:
    """A function with other meanings of some global names, also in the families' functions that it names."""
    names = {**function.__globals__, **others}
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if name not in others and isinstance(called, types.FunctionType) and FAMILIES in called.__module__:
            names[name] = _with(called, others)
    code, closure = function.__code__, function.__closure__
    return types.FunctionType(code, names, function.__name__, function.__defaults__, closure)


def add_peft(model: nn.Module, modules: Sequence[str], rank: int) -> None:
    """Have PEFT inject LoRA layers on linears; its lora_B are zeros."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
    inject_adapter_in_model(lora, model, PEFT_ADAPTER)
    model.eval().requires_grad_(False)


def quantize_blocks(model: nn.Module, config: Config, mode: str) -> None:
    """Convert all linears inside the blocks as the engine does while it loads."""
    convert, linears = find_mode(mode).convert, of(config).family.layout(config).by_module
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
