"""A custom node pack for tests only: it looks into the running pack, and patches models as other packs do.

Its HTTP routes answer without queueing a prompt, so asking does not change what ComfyUI has cached.
"""

import gc
import os
import sys
import threading
import weakref

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import node_helpers
import torch
from aiohttp import web
from server import PromptServer

from . import text_encoders  # noqa: F401 - its route
from .offload import ProbeOutOfMemory, ProbePool, ProbePress, describe
from .power_lora_loader import ProbeAddPatches, ProbeCachedLoraLoader, ProbePowerLoraLoader
from .recompiles import ProbeErrorOnRecompile, ProbeRecompile

CATEGORY = "test"
gate = threading.Event()
_serials = {}  # id of an engine -> (weak reference, serial number)
_weights = {}  # serial number -> weak references to weights of that engine


def _registry():
    name = next(name for name in sys.modules if name.endswith(".accel.registry"))
    return sys.modules[name].ENGINES


def _serial(engine):
    found = _serials.get(id(engine))
    if found is None or found[0]() is not engine:
        found = _serials[id(engine)] = (weakref.ref(engine), max((s for _, s in _serials.values()), default=0) + 1)
    return found[1]


def _describe(key, root):
    engine = root.engine
    serial = _serial(engine)
    if engine.loaded and engine.assembled is not None:
        parameters = engine.assembled.model.parameters()
        _weights.setdefault(serial, []).extend(weakref.ref(parameter) for parameter in parameters)
    return {
        "serial": serial,
        "family": engine.spec.family.name,
        "path": key.file.path,
        "mtime_ns": key.file.mtime_ns,
        "size_bytes": key.file.size_bytes,
        "dtype": str(engine.dtype),
        "compile": key.settings.compile,
        "loaded": engine.loaded,
        "load_count": engine.load_count,
        "compile_count": engine.compiler.count,
        "recompile_count": engine.compiler.recompiles,
        "bytes": engine.bytes,
        **describe(engine, root.planner),
        "resident_stacks": len(engine.library._loras._residents) if engine.library._loras else 0,
        "lora_files": engine.library.pools["files"][0],
    }


def _alive_bytes(serial):
    alive = {id(p): p for reference in _weights.get(serial, ()) if (p := reference()) is not None}
    return sum(p.numel() * p.element_size() for p in alive.values())


@PromptServer.instance.routes.get("/probe/engines")
async def engines(request):
    """The registry's engines, and which engines and weights that were ever seen here still exist."""
    registry = _registry()
    held = [_describe(key, root) for key, root in zip(registry.keys(), registry.values(), strict=True)]
    if request.query.get("collect"):  # only while no prompt runs: models that ComfyUI looks at must not go meanwhile
        gc.collect()
    alive = [serial for reference, serial in _serials.values() if reference() is not None]
    return web.json_response({
        "held": held,
        "alive": sorted(alive),
        "weight_bytes": {serial: _alive_bytes(serial) for serial in _weights},
    })


@PromptServer.instance.routes.post("/probe/stacks_of")
async def stacks_of(request):
    """What the prefetch reads in a graph."""
    asked = await request.json()
    prefetch = sys.modules[next(name for name in sys.modules if name.endswith(".nodes.prefetch"))]
    stacks = prefetch.stacks_of(asked["graph"], asked["checkpoint"])
    return web.json_response([[[os.path.basename(lora.path), lora.strength] for lora in stack] for stack in stacks])


@PromptServer.instance.routes.post("/probe/open")
async def open_gate(request):
    """Let ProbeGate go on."""
    gate.set()
    return web.json_response({})


@PromptServer.instance.routes.post("/probe/interrupt_at_total")
async def interrupt_at_total(request):
    """Press Cancel, as it were, at the first report of progress that counts up to `total`."""
    total = (await request.json())["total"]
    original = comfy.utils.PROGRESS_BAR_HOOK
    pressed = False

    def hook(value, bar_total, *args, **kwargs):
        nonlocal pressed
        if not pressed and bar_total == total and value < total:
            pressed = True
            comfy.utils.set_progress_bar_global_hook(original)
            comfy.model_management.interrupt_current_processing(True)
        return original(value, bar_total, *args, **kwargs)

    comfy.utils.set_progress_bar_global_hook(hook)
    return web.json_response({})


class ProbeGate:
    """Hands its latent on when /probe/open is called."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def execute(self, latent):
        opened = gate.wait(60)
        gate.clear()
        if not opened:
            raise TimeoutError("nobody opened the gate")
        return (latent,)


class ProbeSamplingGate:
    """Holds the first step of a sampling until /probe/open is called."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def execute(self, model):
        passed = False

        def wrapper(executor, *args, **kwargs):
            nonlocal passed
            if not passed:
                passed = gate.wait(60)
                gate.clear()
            return executor(*args, **kwargs)

        patched = model.clone()
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "gate", wrapper)
        return (patched,)


class ProbeConditioning:
    """Shows the shape of a conditioning."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def execute(self, conditioning):
        return {"ui": {"shape": [list(conditioning[0][0].shape)]}}


def scaled(vec, factor):
    """A block's vec, multiplied: one tensor in FLUX.1, shifts, scales and gates in FLUX.2."""
    if isinstance(vec, torch.Tensor):
        return vec * factor
    if isinstance(vec, (tuple, list)):
        return type(vec)(scaled(part, factor) for part in vec)
    return type(vec)(**{name: part * factor for name, part in vars(vec).items()})


class ProbeBlockPatch:
    """patches_replace["dit"]: changes what enters a block and what leaves it."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": ("MODEL",),
            "kind": (["double_block", "single_block"],),
            "index": ("INT", {"default": 0}),
            "change": (["scale_tokens", "scale_conditioning", "skip", "read_options"],),
        }}

    def execute(self, model, kind, index, change):
        def patch(args, extra):
            if change == "skip":
                return {name: args[name] for name in ("img", "txt") if name in args}
            args = dict(args)
            if change == "scale_conditioning":
                args["vec"] = scaled(args["vec"], 0.6)
                return extra["original_block"](args)
            if change == "read_options":
                options = args["transformer_options"]
                facts = (options["block_index"], options["total_blocks"], options["block_type"] == "single",
                         *options.get("img_slice", ()), *options.get("reference_image_num_tokens", ()))
                factor = 1.0 + 0.03 * sum(float(fact) * (place + 1) for place, fact in enumerate(facts))
            else:
                factor = 1.25
            args["img"] = args["img"] * factor
            out = extra["original_block"](args)
            return {name: tokens * (0.9 if name == "img" else 1.1) for name, tokens in out.items()}

        patched = model.clone()
        patched.set_model_patch_replace(patch, "dit", kind, index)
        return (patched,)


class ProbeAttentionPatch:
    """Patches inside attention: change heads, add keys and values, and change what comes out, by block and by place."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def execute(self, model):
        def before(q, k, v, pe=None, attn_mask=None, extra_options=None):
            first, last = extra_options["img_slice"]
            factor = 1.0 + 0.1 * extra_options["block_index"] + 0.2 * (extra_options["block_type"] == "single")
            v = v.clone()
            v[:, :, first:last] *= factor + 0.01 * (last - first)
            return {"q": q * 1.2, "k": torch.cat([k[:, :, :-3], k[:, :, -6:-3]], dim=2), "v": v}

        def after(attended, extra_options):
            return attended * (0.9 + 0.05 * extra_options["total_blocks"])

        patched = model.clone()
        patched.set_model_attn1_patch(before)
        patched.set_model_attn1_output_patch(after)
        return (patched,)


class ProbePostInputPatch:
    """A post_input patch: changes tokens and moves positions."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "extra_tokens": ("BOOLEAN", {"default": False})}}

    def execute(self, model, extra_tokens):
        def patch(args):
            out = dict(args)
            out["img"] = args["img"] * 1.2
            out["img_ids"] = args["img_ids"] * 1.5 + 1.0
            out["txt_ids"] = args["txt_ids"] + 2.0
            if extra_tokens:
                out["txt"] = torch.cat([args["txt"], args["txt"][:, :5] * 0.5], dim=1)
                out["txt_ids"] = torch.cat([out["txt_ids"], out["txt_ids"][:, :5] + 7.0], dim=1)
            return out

        patched = model.clone()
        patched.set_model_patch(patch, "post_input")
        return (patched,)


class ProbeWrapper:
    """A DIFFUSION_MODEL wrapper: changes what enters the transformer and what leaves it."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def execute(self, model):
        def wrapper(executor, x, timestep, context, *args, **kwargs):
            return executor(x * 1.1, timestep, context * 0.8, *args, **kwargs) * 0.9

        patched = model.clone()
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "probe", wrapper)
        return (patched,)


class ProbeAttentionMask:
    """An attention mask on the conditioning, as StyleModelApply writes it for Redux."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "execute", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "tokens": ("INT", {"default": 40})}}

    def execute(self, conditioning, tokens):
        length = conditioning[0][0].shape[1]
        mask = torch.zeros(1, length + 1, length + 1)
        mask[:, :tokens, length - tokens : length] = -1.5
        mask[:, length:, :tokens] = -2.5
        values = {"attention_mask": mask, "attention_mask_img_shape": (1, 1)}
        return (node_helpers.conditioning_set_values(conditioning, values),)


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (ProbeGate, ProbeSamplingGate, ProbeConditioning, ProbeBlockPatch, ProbeAttentionPatch,
                 ProbePostInputPatch, ProbeWrapper,
                 ProbeAttentionMask, ProbeErrorOnRecompile, ProbePowerLoraLoader, ProbeCachedLoraLoader,
                 ProbeAddPatches, ProbeRecompile, ProbeOutOfMemory, ProbePool, ProbePress)
}
