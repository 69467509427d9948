"""A transformer without its weights, and random LoRAs of real size for it.

The base model lies on the meta device: it has every module and every shape, and takes no memory. Only LoRA tensors are
real, which is all that switching a LoRA touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from accel.families.diffusers_models import model_class
from accel.families.layout import FusedLinear, Layout
from accel.files import FileIdentity
from accel.linear.layers import LoraLinear
from accel.linear.slot import bound_to
from accel.lora.adapter import Adapter
from accel.lora.hold.slots import LoraSlots
from accel.lora.kinds.layers import LoraLayer

from .families.base import Config
from .families.registry import of
from .report import BenchmarkError
from .timing import CPU

DTYPE = torch.bfloat16
RANK = 16
# Not 1: then what is bound is not what the file holds, and the check sees whether the strength arrived.
STRENGTH = 0.8
KEY_PREFIX = "transformer."
NATIVE_PREFIX = "diffusion_model."
STD = 0.02
# A visible LoRA's output beside its linear's.
LORA_SHARE = 0.3

# Module -> (lora_A, lora_B)
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RandomLora:
    """A LoRA on all linears inside the blocks, with an own lora_A for each.

    Attributes:
        matrices: name of a linear -> lora_A (rank, in_features) and lora_B (out_features, rank), bf16, as a file holds
            them: for diffusers' linears, which PEFT trains, or for the original ones, where q, k and v are one.
        pairs: module of the model here -> the matrices that it gets of them.
    """

    name: str
    matrices: Pairs
    pairs: Pairs

    @cached_property
    def scaled(self) -> Pairs:
        """What has to be bound at `STRENGTH`, computed apart from the code under test."""
        return self.scaled_by(STRENGTH)

    def scaled_by(self, strength: float) -> Pairs:
        """The same for any strength."""
        return {module: (a, (b.float() * strength).to(DTYPE)) for module, (a, b) in self.pairs.items()}

    @property
    def bytes(self) -> int:
        """Of all matrices."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.matrices.values() for tensor in pair)

    def state_dict(self, prefix: str = "", adapter: str = "") -> dict[str, Tensor]:
        """The tensors under PEFT's keys: `<prefix><name>.lora_A[.<adapter>].weight`."""
        middle = f".{adapter}" if adapter else ""
        return {
            f"{prefix}{name}.lora_{role}{middle}.weight": tensor
            for name, pair in self.matrices.items()
            for role, tensor in zip("AB", pair, strict=True)
        }

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """The tensors under sd-scripts' keys, with alphas."""
        tensors = {}
        for name, (a, b) in self.matrices.items():
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0]), dtype=DTYPE)
        return tensors


def meta_model(config: Config) -> nn.Module:
    """The model as the engine builds it, on the meta device, bf16."""
    return _on_meta(of(config).family.build, config)


def diffusers_model(config: Config) -> nn.Module:
    """The model of diffusers itself, likewise."""
    family = of(config).family
    return _on_meta(lambda config: model_class(family.diffusers_class)(**family.diffusers_config(config)), config)


def _on_meta(build: Callable[[Any], nn.Module], config: Config) -> nn.Module:
    with torch.device("meta"):
        return nn.Module.to(build(config), DTYPE).eval().requires_grad_(False)


def slots_of(config: Config, device: torch.device) -> tuple[nn.Module, LoraSlots]:
    """A model with the pack's LoRA layers on every linear, as `Engine.load` adds them; for LoRAs on a device."""
    model = meta_model(config)
    return model, LoraSlots(model, of(config).family.layout(config).modules, device)


def random_lora(config: Config, name: str, seed: int, rank: int = RANK, device: torch.device = CPU) -> RandomLora:
    """Make a LoRA on diffusers' linears; the same seed and device give the same values, a GPU sooner than a CPU."""
    return _random(of(config).diffusers_layout(config), name, seed, rank, lambda in_features: STD, STD, device)


def visible_lora(config: Config, name: str, seed: int, rank: int, device: torch.device) -> RandomLora:
    """`random_lora`, whose output is `LORA_SHARE` of its linear's over weights of `random_checkpoint`: one sees it."""
    layout, b_std = of(config).diffusers_layout(config), LORA_SHARE * rank**-0.5
    return _random(layout, name, seed, rank, lambda in_features: in_features**-0.5, b_std, device)


def fused_lora(config: Config, name: str, seed: int, rank: int = RANK) -> RandomLora:
    """Make a LoRA on the original linears, in host memory."""
    return _random(of(config).family.layout(config), name, seed, rank, lambda in_features: STD, STD, CPU)


def _random(
    layout: Layout, name: str, seed: int, rank: int, a_std: Callable[[int], float], b_std: float, device: torch.device
) -> RandomLora:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns, dtype=DTYPE, device=device).normal_(0.0, std, generator=generator).cpu()

    matrices, pairs = {}, {}
    for linear in linears_in_blocks(layout):
        a, b = normal(rank, linear.in_features, a_std(linear.in_features)), normal(linear.out_features, rank, b_std)
        matrices[linear.name] = a, b
        pairs |= {part.module: (a, b[part.start : part.start + part.rows]) for part in linear.parts}
    return RandomLora(name, matrices, pairs)


def lora_weights(lora: RandomLora) -> Adapter:
    """A LoRA as the reader gives it."""
    layers = tuple(LoraLayer(module, a, b, 1.0) for module, (a, b) in lora.pairs.items())
    return Adapter(FileIdentity(lora.name, 0, 0), layers, ())


def linears_in_blocks(layout: Layout) -> Iterator[FusedLinear]:
    """Those that a LoRA of the benchmarks is on."""
    return (linear for linear in layout.linears if layout.block_of(linear.parts[0].module) is not None)


def check_bound(variant: str, model: nn.Module, adapter: str | None, expected: Pairs) -> tuple[Tensor, ...]:
    """Make sure that the model's LoRA layers hold exactly these tensors, and that no other layer holds any.

    Args:
        variant: what the message begins with.
        model: with LoRA layers.
        adapter: of PEFT's layers; None for the pack's own.
        expected: what must be bound, on the device where it must be.

    Returns:
        The tensors of `expected`'s layers.

    Raises:
        BenchmarkError: a value differs in one bit, or a layer outside `expected` is not zero.
    """
    seen: list[Tensor] = []
    for module, layer in model.named_modules():
        if adapter is None:
            if not isinstance(layer, LoraLinear):
                continue
            lora = bound_to(layer.lora)
            bound = lora.lora_A, lora.lora_B
        elif adapter in getattr(layer, "lora_A", ()):
            bound = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        else:
            continue
        if module not in expected:
            if any(tensor is not None and tensor.any() for tensor in bound):
                raise BenchmarkError(f"{variant}: {module} is not part of the LoRA, but is not zero after the switch.")
            continue
        seen += bound
        for role, tensor, wanted in zip("AB", bound, expected[module], strict=True):
            if tensor is None or not same_bits(tensor, wanted):
                raise BenchmarkError(f"{variant}: lora_{role} of {module} is not the tensor that was asked for.")
    if len(seen) != 2 * len(expected):
        raise BenchmarkError(f"{variant}: the model has {len(seen) // 2} of the {len(expected)} layers of the LoRA.")
    return tuple(seen)


def pairs_on(device: torch.device, pairs: Pairs) -> Pairs:
    """The same matrices on a device."""
    return {module: (a.to(device), b.to(device)) for module, (a, b) in pairs.items()}


def same_bits(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether two bf16 tensors of one device agree in every bit."""
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        return False
    return torch.equal(tensor.detach().view(torch.int16), wanted.view(torch.int16))
