"""FLUX.1-dev without its weights, and random LoRAs of real size for it.

The base model lies on the meta device: it has every module and every shape, and takes no memory. Only LoRA tensors are
real, which is all that switching a LoRA touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from accel.families.flux1 import Flux1, Flux1Config
from accel.families.layout import Layout
from accel.files import FileIdentity
from accel.linear.layers import LoraLinear
from accel.linear.slot import bound_to
from accel.lora.adapter import Adapter
from accel.lora.hold.slots import LoraSlots
from accel.lora.kinds.layers import LoraLayer

from .report import BenchmarkError
from .timing import CPU

DTYPE = torch.bfloat16
RANK = 16
# Not 1: then what is bound is not what the file holds, and the check sees whether the strength arrived.
STRENGTH = 0.8
KEY_PREFIX = "transformer."
STD = 0.02
# A visible LoRA's output beside its linear's.
LORA_SHARE = 0.3

DEV = Flux1.published["flux1-dev"]
QUICK = Flux1Config(256, 2, 4, 64, 64, 768, 768, 1024, True)

# diffusers module -> (lora_A, lora_B)
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RandomLora:
    """A LoRA on all linears inside the blocks, with an own lora_A for each, as PEFT trains it.

    Attributes:
        pairs: lora_A (rank, in_features) and lora_B (out_features, rank), bf16, as a file holds them.
    """

    name: str
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
        return sum(tensor.numel() * tensor.element_size() for pair in self.pairs.values() for tensor in pair)

    def state_dict(self, prefix: str = "", adapter: str = "") -> dict[str, Tensor]:
        """The tensors under PEFT's keys: `<prefix><module>.lora_A[.<adapter>].weight`."""
        middle = f".{adapter}" if adapter else ""
        return {
            f"{prefix}{module}.lora_{role}{middle}.weight": tensor
            for module, pair in self.pairs.items()
            for role, tensor in zip("AB", pair, strict=True)
        }


def meta_model(config: Flux1Config) -> nn.Module:
    """The diffusers transformer as the engine builds it, on the meta device, bf16."""
    with torch.device("meta"):
        return nn.Module.to(Flux1().build(config), DTYPE).eval().requires_grad_(False)


def slots_of(config: Flux1Config, device: torch.device) -> tuple[nn.Module, LoraSlots]:
    """A model with the pack's LoRA layers on every linear, as `Engine.load` adds them; for LoRAs on a device."""
    model = meta_model(config)
    return model, LoraSlots(model, Flux1().layout(config).modules, device)


def random_lora(config: Flux1Config, name: str, seed: int, rank: int = RANK, device: torch.device = CPU) -> RandomLora:
    """Make a LoRA in host memory; the same seed and device give the same values, a GPU much sooner than a CPU."""
    return RandomLora(name, _random_pairs(config, seed, rank, lambda in_features: STD, STD, device))


def visible_lora(config: Flux1Config, name: str, seed: int, rank: int, device: torch.device) -> RandomLora:
    """`random_lora`, whose output is `LORA_SHARE` of its linear's over weights of `random_checkpoint`: one sees it."""
    b_std = LORA_SHARE * rank**-0.5
    return RandomLora(name, _random_pairs(config, seed, rank, lambda in_features: in_features**-0.5, b_std, device))


def _random_pairs(
    config: Flux1Config, seed: int, rank: int, a_std: Callable[[int], float], b_std: float, device: torch.device
) -> Pairs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns, dtype=DTYPE, device=device).normal_(0.0, std, generator=generator).cpu()

    return {
        module: (normal(rank, in_features, a_std(in_features)), normal(out_features, rank, b_std))
        for module, out_features, in_features in block_linears(Flux1().layout(config))
    }


def lora_weights(lora: RandomLora) -> Adapter:
    """A LoRA as the reader gives it."""
    layers = tuple(LoraLayer(module, a, b, 1.0) for module, (a, b) in lora.pairs.items())
    return Adapter(FileIdentity(lora.name, 0, 0), layers, ())


@dataclass(frozen=True)
class FusedLora:
    """A LoRA whose matrices belong to BFL's linears, where q, k and v are one: `kohya` or `native` files.

    Attributes:
        matrices: BFL name -> (lora_A, lora_B), bf16.
        pairs: diffusers module -> the matrices that it gets of them.
    """

    name: str
    matrices: Pairs
    pairs: Pairs

    @cached_property
    def scaled(self) -> Pairs:
        """What has to be bound at `STRENGTH`."""
        return {module: (a, (b.float() * STRENGTH).to(DTYPE)) for module, (a, b) in self.pairs.items()}

    def state_dict(self, format: str) -> dict[str, Tensor]:
        """The tensors under sd-scripts' keys ("kohya", with alphas) or ComfyUI's ("native")."""
        tensors = {}
        for name, (a, b) in self.matrices.items():
            if format == "kohya":
                key = f"lora_unet_{name.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
                tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0]), dtype=DTYPE)
            else:
                key = f"diffusion_model.{name}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        return tensors


def fused_lora(config: Flux1Config, name: str, seed: int, rank: int = RANK) -> FusedLora:
    """Make a LoRA on all linears inside the blocks; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    matrices, pairs = {}, {}
    layout = Flux1().layout(config)
    for linear in layout.linears:
        if layout.block_of(linear.parts[0].module) is not None:
            a, b = (
                torch.empty(shape, dtype=DTYPE).normal_(0.0, 0.02, generator=generator)
                for shape in ((rank, linear.in_features), (linear.out_features, rank))
            )
            matrices[linear.name] = a, b
            for part in linear.parts:
                pairs[part.module] = a, b[part.start : part.start + part.rows]
    return FusedLora(name, matrices, pairs)


def block_linears(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(diffusers module, out_features, in_features) of every linear inside the blocks."""
    for linear in layout.linears:
        for part in linear.parts:
            if layout.block_of(part.module) is not None:
                yield part.module, part.rows, linear.in_features


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
