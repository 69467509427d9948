"""Make an engine of what the loader node was told, as a MODEL that ComfyUI can hand around."""

from __future__ import annotations

import os

import comfy.model_management

from ..accel.compile.cache import CompileCache
from ..accel.engine import Engine
from ..accel.memory.device import memory_of
from ..accel.registry import ENGINES, EngineKey
from ..accel.settings import EngineSettings
from ..accel.spec import ModelSpec
from .families import registry
from .files import cache_folder
from .patcher import AcceleratedModelPatcher
from .planning import may_pin, planner_for
from .progress import NodeObserver

# Imported with the loader node: where this ComfyUI lacks a family's model, the node is left out, and the log says why.
FAMILIES = registry.families()


def model_of(spec: ModelSpec, settings: EngineSettings) -> AcceleratedModelPatcher:
    """A clone of the model in the registry that has these settings; made there if there is none.

    Raises:
        SettingsError: the machine cannot do what the settings ask for, or the model does not fit.
    """
    key = EngineKey.of(spec.file.identity, settings)
    return ENGINES.get_or_build(key, lambda: _build(spec, settings)).clone()


def _build(spec: ModelSpec, settings: EngineSettings) -> AcceleratedModelPatcher:
    device, folder = comfy.model_management.get_torch_device(), cache_folder()
    engine = Engine(
        spec,
        settings,
        NodeObserver(),
        lora_cache=os.path.join(folder, "loras"),
        compile_cache=CompileCache(os.path.join(folder, "compiled")),
        plan=lambda: planner(),  # made below: it asks the engine for its sizes
        memory=memory_of(device, may_pin()),
    )
    planner = planner_for(engine)
    model = FAMILIES[spec.family.name].base_model(engine, planner)
    return AcceleratedModelPatcher(model, device, comfy.model_management.unet_offload_device())
