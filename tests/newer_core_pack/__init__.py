"""A custom node pack for tests only: it gives the newest ComfyUI that can be fetched the habits of 0.46.

Each of them broke this pack, or could have. They are imitated because no tree of such a version is at hand; the rest of
the server is the real one. What is imitated, and where ComfyUI has it:

- one more keyword, `fast_disk`, through `ModelPatcher.__init__` and `clone` (0.37, comfy/model_patcher.py);
- linears and embeddings without parameters until a state dict is loaded (0.30 with dynamic VRAM, comfy/ops.py): only
  this part of dynamic VRAM, which a CPU does not have;
- patches `("config", (tensor,))` for each key of a LoRA file that ends in `.config` (about 0.40, comfy/lora.py);
- nodes that run where the server has no `prompt_queue` (execution in a process of its own).
"""

import functools
from unittest import mock

import comfy.lora
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


class Overlay:
    """An object as another one, but for some attributes, and without some."""

    def __init__(self, below, without=(), **above):
        self.__dict__.update(above, _below=below, _without=without)

    def __getattr__(self, name):
        if name in self._without:
            raise AttributeError(f"'{type(self._below).__name__}' object has no attribute '{name}'")
        return getattr(self._below, name)


def pass_fast_disk_through(patcher):
    """Let the constructor take `fast_disk`, and `clone` hand it on, to whatever class the copy is of."""
    construct, clone = patcher.__init__, patcher.clone

    @functools.wraps(construct)
    def __init__(self, *args, fast_disk=False, **kwargs):
        construct(self, *args, **kwargs)
        self.fast_disk = fast_disk

    @functools.wraps(clone)
    def cloned(self, *args, **kwargs):
        class_ = type(self)
        with mock.patch.object(class_, "__init__", functools.partialmethod(class_.__init__, fast_disk=self.fast_disk)):
            return clone(self, *args, **kwargs)

    patcher.__init__, patcher.clone = __init__, cloned


def make_linears_lazy(ops):
    """Let comfy.ops alone believe that dynamic VRAM is on; it asks only where it makes and fills parameters."""
    memory = Overlay(comfy.memory_management, aimdo_enabled=True)
    devices = Overlay(comfy.model_management, WINDOWS=True)  # a further condition before 0.30
    ops.comfy = Overlay(comfy, memory_management=memory, model_management=devices)
    assert ops.disable_weight_init.Linear(2, 2).weight is None


def bring_configs(lora):
    """Let `load_lora` make a patch of each entry that configures a module."""
    load = lora.load_lora

    @functools.wraps(load)
    def load_lora(file, to_load, log_missing=True):
        configs = {key: ("config", (value,)) for key, value in file.items() if key.endswith(".config")}
        others = {key: value for key, value in file.items() if key not in configs}
        return {**load(others, to_load, log_missing), **configs}

    lora.load_lora = load_lora


pass_fast_disk_through(comfy.model_patcher.ModelPatcher)
make_linears_lazy(comfy.ops)
bring_configs(comfy.lora)
PromptServer.instance = Overlay(PromptServer.instance, without=("prompt_queue",))
