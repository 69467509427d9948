"""An engine's life in ComfyUI's memory management: ComfyUI asks for sizes, and says when to load and to give way."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_management
import torch

from ..accel.offload.planner import Planner
from .limits import LimitedPatcher
from .planning import further_reserve, out_of_memory

log = logging.getLogger(__name__)

# ComfyUI writes 1e32 bytes for "whatever it needs".
UNLIMITED = 1e30


class ResidentPatcher(LimitedPatcher):
    """A handle on a shared engine, through which ComfyUI loads and unloads it.

    The engine stays in host memory, or on the device, while any handle exists, and leaves both when the last one goes
    after ComfyUI has unloaded it.
    """

    @property
    def planner(self) -> Planner:
        """What decides how much of the device the engine takes."""
        return self.model.planner

    def clone(self, *args: Any, **kwargs: Any) -> ResidentPatcher:
        """Copy the handle, not the engine."""
        copy = super().clone(*args, **kwargs)
        self.model.handles += 1
        weakref.finalize(copy, _forget, weakref.ref(self.model)).atexit = False
        return copy

    def model_size(self, *_: Any, **__: Any) -> int:
        """Bytes that the engine takes of the device when nothing disturbs it."""
        return max(self.planner.wanted_bytes, self.loaded_size())

    def loaded_size(self, *_: Any, **__: Any) -> int:
        """Bytes that it takes now."""
        return self.engine.device_bytes + self.engine.library.device_bytes

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, *_: Any, **__: Any) -> int:
        """Load the engine, or bring as many more blocks as the memory allows. Returns the bytes gained.

        Args:
            device_to: the GPU.
            extra_memory: bytes that ComfyUI lets it take beyond what it has; less than 0 to give some back.
        """
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            # Clones share the backup of object patches, so this clone's are applied anew each time.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            before = self.loaded_size()
            try:
                self._load(before + extra_memory if extra_memory < UNLIMITED else math.inf)
            except BaseException:
                self.detach()
                raise
            self.model.device = device_to
            return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0, *_: Any, **__: Any) -> int:
        """Go on with fewer blocks on the device. Returns the bytes freed.

        0 when the engine has to go whole: ComfyUI then calls `detach`.
        """
        before = self.loaded_size()
        if not self.engine.loaded or not self.planner.give(memory_to_free):
            return 0
        log.info("Flux Hotswap: gives memory to another model: %s", self.planner.plan.sentence)
        # Where even the way there has no room, the engine has given back everything.
        with suppress(MemoryError, torch.OutOfMemoryError):
            self.engine.replan()
        return before - self.loaded_size()

    def detach(self, unpatch_all: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Give the memory back if ComfyUI means it (`unpatch_all`); it also calls this on every reload and deletion."""
        model = super().detach(unpatch_all, *args, **kwargs)
        if unpatch_all:
            self.model.unloaded = True
            if self.planner.shared or not self.model.handles:
                self.engine.release()
            else:
                self.engine.offload()
        return model

    def _load(self, device_bytes: float | None = None) -> None:
        """Load, or move blocks, by a plan for so much of the device; by default for what is free."""
        engine, planner = self.engine, self.planner
        if device_bytes is None:
            free = comfy.model_management.get_free_memory(self.load_device)
            device_bytes = self.loaded_size() + free - comfy.model_management.minimum_inference_memory()
        changed = planner.allow(device_bytes - further_reserve(planner.offload), engine.library.device_bytes)
        if changed:
            log.info("Flux Hotswap: offload %s", planner.plan.sentence)
        self.model.unloaded = False
        start, was_loaded = time.perf_counter(), engine.loaded
        with self._explaining("loading"):
            if engine.loaded and changed:
                engine.replan()
            else:
                engine.load()
        if not was_loaded:
            self.model.last_load_s = time.perf_counter() - start

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Say what to change where the device runs out of memory, and give the engine's part of it back.

        Raises:
            DeviceMemoryError: in place of torch's.
        """
        try:
            yield
        except torch.OutOfMemoryError as exc:
            exc.__traceback__ = None  # its frames hold tensors
            raise out_of_memory(self.engine, self.planner, what) from exc


def _forget(model: weakref.ref) -> None:
    """A clone is gone. With the last one, an engine that ComfyUI unloaded leaves host memory, too.

    So does any other model of ComfyUI's: /free drops its weights with the outputs of the nodes. What is compiled stays.
    """
    found = model()
    if found is not None:
        found.handles -= 1
        if not found.handles and found.unloaded:
            found.diffusion_model.engine.release()
