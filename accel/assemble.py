"""From a recipe to what an engine runs: a model with its weights and LoRA slots, and the regions over its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .attention import Attention, choose_attention
from .build import load_model
from .compile.cache import CompileCache
from .compile.compiler import RegionCompiler
from .load import load_quantized
from .lora.hold.slots import LoraSlots
from .memory.base import DeviceMemory
from .observer import Observer
from .offload.plan import OffloadPlan
from .offload.weights import Weights
from .recipe import Recipe


@dataclass(frozen=True)
class Regions:
    """The functions over blocks that one engine runs.

    Attributes:
        attention: the backend that they call.
        attend: its function.
        functions: in the order in which the family has them, compiled at their first calls.
    """

    attention: str
    attend: Attention
    functions: tuple[Callable, ...]


def make_regions(
    recipe: Recipe, compiler: RegionCompiler, compile_cache: CompileCache | None, observer: Observer
) -> Regions:
    """Choose the attention and wrap the family's regions; nothing is compiled yet.

    Args:
        recipe: of the engine.
        compiler: of the engine; gets the files for what it compiles.
        compile_cache: where those are; None leaves them to torch's own cache.
        observer: hears of the choice.

    Raises:
        SettingsError: the attention backend does not run here after all, or computes wrong numbers.
    """
    settings, family = recipe.settings, recipe.spec.family
    chosen = choose_attention(settings.attention, recipe.attention_target)
    for warning in chosen.warnings:
        observer.notice(warning, True)
    observer.notice(chosen.sentence, False)
    if compile_cache is not None:
        compiler.files = compile_cache.files(recipe.code_key(chosen.name), observer.notice)
    functions = family.regions(chosen.attention)
    if settings.compile == "full":
        functions = (*functions, family.whole(chosen.attention))
    return Regions(chosen.name, chosen.attention, tuple(compiler.region(function) for function in functions))


@dataclass(frozen=True)
class Assembled:
    """A model that was read.

    Attributes:
        model: diffusers' modules with the weights.
        weights: where those lie, and the way between the host and the device.
        slots: one for each linear that a LoRA may change.
    """

    model: nn.Module
    weights: Weights
    slots: LoraSlots


def assemble(recipe: Recipe, plan: OffloadPlan, memory: DeviceMemory, observer: Observer) -> Assembled:
    """Read the weights, each to where the plan has it, and add the LoRA slots.

    Raises:
        torch.OutOfMemoryError: the device has no room; nothing is kept then.
        FileError: the file is gone or changed since its header was read.
        CheckpointError: a weight is not finite.
    """
    layout = recipe.spec.layout
    weights = Weights(memory, plan, layout.block_of, len(layout.blocks))
    try:
        model = _read_model(recipe, weights, observer)
    except BaseException:
        weights.close()
        raise
    slots = LoraSlots(model, layout.modules, recipe.device, weights.own_parameters)
    return Assembled(model, weights, slots)


def _read_model(recipe: Recipe, weights: Weights, observer: Observer) -> nn.Module:
    spec, dtype, device, mode = recipe.spec, recipe.dtype, recipe.device, recipe.mode
    if mode is None:
        return load_model(spec, dtype, device, observer.loading, destination=weights)
    for sentence in mode.does_without(device, dtype):
        observer.notice(f"{mode.name}: {sentence}.", False)
    if mode.needs_compile and recipe.settings.compile == "off":
        observer.notice(
            f"{mode.name} without compiling is slower than no quantization: set 'compile' to 'regional', or choose "
            "a weight-only mode.",
            True,
        )
    cache = recipe.settings.quantization.cache
    return load_quantized(spec, dtype, device, mode, cache, observer.loading, observer.notice, weights)
