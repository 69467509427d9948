"""Memory that runs out, and a pool of host memory that stands for a GPU."""

import sys

import comfy.model_management
import torch

CATEGORY = "test"
_pools = {}  # (checkpoint, mode, budget in bytes) -> root patcher


def module(name):
    """A module of the pack under test, such as ".accel.engine"."""
    return sys.modules[next(each for each in sys.modules if each.endswith(name))]


def describe(engine, planner):
    """What an engine takes, and by which plan."""
    plan, ring = planner.plan, engine.assembled.weights.ring if engine.assembled else None
    return {
        "plan": {name: getattr(plan, name) for name in (
            "mode", "resident_blocks", "total_blocks", "device_bytes", "copied_bytes_per_step", "lora_bytes")},
        "device_bytes": engine.device_bytes + engine.library.device_bytes,
        "host_bytes": engine.memory.host_bytes,
        "ring": ring is not None,
    }


class ProbeOutOfMemory:
    """Fails a block of one step as an allocator does."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": ("MODEL",),
            "kind": (["double_block", "single_block"],),
            "index": ("INT", {"default": 0}),
            "step": ("INT", {"default": 1}),
        }}

    def execute(self, model, kind, index, step):
        calls = 0

        def patch(args, extra):
            nonlocal calls
            calls += 1
            out = extra["original_block"](args)
            if calls == step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return out

        patched = model.clone()
        patched.set_model_patch_replace(patch, "dit", kind, index)
        return (patched,)


class ProbePool:
    """The model on a device of its own: a pool of host memory. It stays for later prompts."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": ("MODEL",),
            "mode": (["auto", "none", "model", "stream"],),
            "free_bytes": ("INT", {"default": 0, "max": 2**40}),
        }}

    def execute(self, model, mode, free_bytes):
        key = (model.engine.spec.file.name, mode, free_bytes)
        if key not in _pools:
            _pools[key] = self._root(model.engine, mode, free_bytes)
        return (_pools[key].clone(),)

    def _root(self, engine, mode, free_bytes):
        plan, memory = module(".accel.offload.plan"), module(".accel.memory.cpu")
        settings = module(".accel.settings").Offload(mode, reserve_gb=0.0)
        pooled = module(".accel.engine").Engine(
            engine.spec,
            engine.settings,
            plan=lambda: planner(),
            memory=memory.HostMemory(free_bytes, threaded=True, flat=True),
        )
        demand = plan.demand_of(engine.spec, engine.dtype, "none", engine.settings.compile != "off")
        planner = module(".accel.offload.planner").Planner(demand, settings, plan.Room(free_bytes))
        cpu = torch.device("cpu")
        family = module(".nodes.families.registry").families()[engine.spec.family.name]
        model = family.base_model(pooled, planner)
        return module(".nodes.patcher").AcceleratedModelPatcher(model, cpu, cpu)


class ProbePress:
    """Does with a model of ProbePool what ComfyUI does on a GPU: asks it for memory, or gives it some."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": ("MODEL",),
            "unload_bytes": ("INT", {"default": 0, "max": 2**40}),
            "more_bytes": ("INT", {"default": 0, "min": -(2**40), "max": 2**40}),
        }}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def execute(self, model, unload_bytes, more_bytes):
        models = comfy.model_management.current_loaded_models
        loaded = next(each for each in models if each.model is not None and model.is_clone(each.model))
        seen = {"size": loaded.model_memory(), "before": loaded.model_loaded_memory(), "unloaded": False}
        if unload_bytes:
            seen["unloaded"] = loaded.model_unload(unload_bytes)
            if seen["unloaded"]:
                models.remove(loaded)
        if more_bytes:
            seen["gained"] = loaded.model_use_more_vram(more_bytes)
        engine = model.engine
        seen |= {
            "after": model.loaded_size(),
            "load_count": engine.load_count,
            "recompiles": engine.compiler.recompiles,
            "compiles": engine.compiler.count,
            "pool_bytes": engine.memory.bytes,
            "pool_peak_bytes": engine.memory.peak_bytes,
            **describe(engine, model.planner),
        }
        return {"ui": {"seen": [seen]}}
