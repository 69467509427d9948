"""One compiled transformer that lives across prompts, and the switching of LoRAs on it."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .assemble import Assembled, Regions, assemble, make_regions
from .attention import check_attention, prove_attention
from .compile.cache import CompileCache
from .compile.compiler import RegionCompiler
from .errors import EngineStateError
from .history import SwapReport
from .lora.adapter import Adapter
from .lora.hold.library import LoraLibrary
from .lora.stack import LoraStack
from .memory.base import DeviceMemory
from .memory.budgets import PoolBudgets, without_strengths
from .memory.device import memory_of
from .observer import Observer, Silent
from .offload.plan import OffloadPlan
from .offload.prove import restrict
from .recipe import Recipe
from .settings import EngineSettings
from .spec import ModelSpec


class Engine:
    """A transformer with LoRA slots. Made from a header; `load` reads the weights.

    Call order: `load`, then calls. After `load` no LoRA is bound; `swap` binds others at any time between calls.
    `offload` and `release` give memory back between calls; the next `load` then compiles nothing anew.

    Attributes:
        spec: the checkpoint.
        settings: what it was made with.
        device: where the weights go.
        dtype: what it computes in.
        attention: the backend; "auto" until the first `load` has chosen.
        bytes: what the weights take.
        compiler: counts what it compiled: this package promises no recompiles.
        library: the LoRAs in memory, and what they take of it.
        lora_cache: folder for LoRA matrices that are slow to compute, or None.
        load_count: how often the checkpoint was read.
        memory: of the device.
        assembled: the transformer, where its weights lie, and its slots; None before the first `load` and after
            `release`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        observer: Observer | None = None,
        pools: PoolBudgets | None = None,
        lora_cache: str | os.PathLike[str] | None = None,
        compile_cache: CompileCache | None = None,
        plan: OffloadPlan | Callable[[], OffloadPlan] | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        """Check the settings against the machine, and try there what they ask for; read nothing but the header.

        Args:
            spec: the checkpoint.
            settings: how to build the engine.
            observer: hears of what takes long.
            pools: what LoRAs may keep of the memory; by default `PoolBudgets.of_free_memory`, taken at each `load`.
            lora_cache: folder for LoRA matrices that are slow to compute; None computes them each time.
            compile_cache: keeps compiled code for the next start; None leaves that to torch's own cache.
            plan: what of the weights stays on the device, or what decides it, called at each `load`; None: everything.
            memory: of the device; by default as `memory.device.memory_of` has it.

        Raises:
            SettingsError: the machine cannot do what the settings ask for.
        """
        self._recipe = recipe = Recipe.of(spec, settings)
        self.spec, self.settings = spec, settings
        self.device, self.dtype, self.bytes = recipe.device, recipe.dtype, recipe.weight_bytes
        self._observer = observer or Silent()
        self.compiler = RegionCompiler(settings.compile, self._observer)
        self._compile_cache = compile_cache
        self.attention = settings.attention
        check_attention(settings.attention, recipe.attention_target)
        prove_attention(settings.attention, recipe.attention_target)
        self._regions: Regions | None = None
        self._pools = pools
        self._plan = plan
        self.memory = memory or memory_of(self.device)
        for sentence in restrict(self.memory):
            self._observer.notice(sentence, True)
        budgets = self._budgets(reserved_bytes=self.bytes)
        self.lora_cache = lora_cache
        self.library = LoraLibrary(spec, self.dtype, self.device, budgets, lora_cache, self.memory)
        self.load_count = 0
        self._lock = threading.RLock()
        self.assembled: Assembled | None = None
        self._forward: Callable[[Any], Tensor] | None = None
        self._applied: tuple[object, ...] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are on the device."""
        return self._forward is not None

    @property
    def device_bytes(self) -> int:
        """What the weights take of the device now, staging included; LoRAs not."""
        return 0 if self.assembled is None else self.assembled.weights.device_bytes

    @property
    def plan(self) -> OffloadPlan | None:
        """By which the weights lie where they are; None when nothing is loaded."""
        return self.assembled.weights.plan if self.assembled is not None and self.loaded else None

    def load(self) -> None:
        """Read the weights, add the LoRA slots, bind no LoRA. Does nothing when loaded.

        What is on the host already is not read again, and another plan than last time compiles nothing anew.

        Raises:
            torch.OutOfMemoryError: the device has no room for them; the engine is then as after `offload`, or, if they
                were being read, as after `release`.
            FileError: the file is gone or changed since its header was read.
            CheckpointError: a weight is not finite.
            SettingsError: the attention backend does not run here after all, or computes wrong numbers.
        """
        # Parameters made in ComfyUI's inference mode could not be rebound outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.loaded:
                return
            if self._regions is None:
                self._regions = make_regions(self._recipe, self.compiler, self._compile_cache, self._observer)
                self.attention = self._regions.attention
            plan = self._current_plan()
            if self.assembled is None:
                self.assembled = assemble(self._recipe, plan, self.memory, self._observer)
                self.load_count += 1
            self._place(self.assembled, plan)
            self.library.attach(self.assembled.slots, self._budgets(plan=plan))
            self._start(self.assembled, self._regions)

    def replan(self) -> None:
        """Move what the plan has elsewhere now, and no more; as after `load`, no LoRA is bound. For a loaded engine.

        Raises:
            torch.OutOfMemoryError: see `load`.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.assembled is None or self._regions is None or not self.loaded:
                return
            self._forward = self._applied = None
            # Else vectors of a LoRA would be taken for the model's own.
            self.assembled.slots.unbind()
            self._place(self.assembled, self._current_plan())
            self._start(self.assembled, self._regions)

    def _place(self, made: Assembled, plan: OffloadPlan) -> None:
        try:
            made.weights.place(plan)
        except BaseException as exc:
            # Its frames hold buffers of the device for as long as somebody keeps the exception.
            traceback.clear_frames(exc.__traceback__)
            self._offload(made)
            raise

    def _start(self, made: Assembled, regions: Regions) -> None:
        made.slots.bind(made.slots.empty)
        self._applied = LoraStack().key
        family, config, ring = self.spec.family, self.spec.config, made.weights.ring
        self._forward = family.forward(config, made.model, regions.functions, regions.attend, ring)

    def offload(self) -> None:
        """Move the weights to host memory. The next `load` moves them back, without reading or compiling.

        Where the host has no room for them, it is a `release`.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.assembled is not None and self.loaded:
                self._offload(self.assembled)

    def _offload(self, made: Assembled) -> None:
        self._forward = self._applied = None
        self.library.detach()
        made.slots.unbind()
        try:
            made.weights.offload()
        except BaseException as exc:
            traceback.clear_frames(exc.__traceback__)
            self.release()
            if not isinstance(exc, MemoryError):
                raise
            self._observer.notice("The host has no room for the weights: they are read again when needed.", True)

    def release(self) -> None:
        """Give all memory back. Compiled code stays, and serves the next `load`."""
        with self._lock:
            if self.assembled is not None:
                self.assembled.weights.close()
            self._forward = self._applied = self.assembled = None
            self.library.clear()

    def _budgets(self, reserved_bytes: int = 0, plan: OffloadPlan | None = None) -> PoolBudgets:
        if self._pools is not None:
            return self._pools
        budgets = PoolBudgets.of_free_memory(self.device, reserved_bytes)
        if plan is None or not plan.lora_bytes or not self.memory.separate:
            return budgets
        return replace(budgets, device_bytes=without_strengths(plan.lora_bytes))

    def _current_plan(self) -> OffloadPlan:
        if self._plan is None:
            blocks = len(self.spec.layout.blocks)
            return OffloadPlan("none", blocks, blocks, self.bytes, 0, "everything on the device")
        return self._plan() if callable(self._plan) else self._plan

    def read_lora(self, path: str | os.PathLike[str]) -> Adapter:
        """Read and check a LoRA file for this model; from memory while the file is unchanged.

        Raises:
            FileError: see `lora.read.file.read_lora`.
            LoraError: likewise.
        """
        return self.library.read(path)

    def prefetch(self, stack: LoraStack) -> None:
        """Prepare a stack so that a later `swap` has little left to do; from any thread, while the engine computes.

        It comes to the device when it fits beside what is there, and otherwise waits in host memory. What is bound
        does not change.

        Raises:
            LoraError: see `lora.pack.flat.flatten`.
            torch.OutOfMemoryError: the device has no room for the stack after all.
        """
        if stack.active and (self.loaded or not stack.needs_base):
            # Takes long, so outside the lock: a swap must not wait for it.
            self.library.prepare(stack, background=True)
            with self._lock:
                if self.loaded:
                    self.library.make_resident(stack, evict=False)

    def prefetch_room(self, stack: LoraStack) -> bool:
        """Whether the host pool has room for a further stack like this without dropping anything."""
        size = sum(entry.adapter.bytes for entry in stack.active)
        return self.library.prepared(stack) or self.library.host_bytes + size <= self.library.host_budget_bytes

    def swap(self, stack: LoraStack) -> SwapReport:
        """Make a stack the one that the engine computes with. A transaction: on any error the old one stays.

        Raises:
            EngineStateError: the weights are not loaded.
            LoraError: see `lora.pack.flat.flatten`.
            torch.OutOfMemoryError: the device has no room for the stack.
        """
        with self._lock:
            if not self.loaded:
                raise EngineStateError("swap before load: call Engine.load first.")
            start = time.perf_counter()
            source, size, error = "unchanged", 0, 0.0
            if stack.key != self._applied:
                resident = self.library.make_resident(stack)
                # An interrupt can rise between any two lines: what is not known to be bound counts as unknown.
                self._applied = None
                size = self.library.bind(resident)
                self._applied = stack.key
                source, error = resident.source, resident.error
            return SwapReport(str(stack), source, (time.perf_counter() - start) * 1e3, size, error)

    @property
    def bound(self) -> tuple[object, ...] | None:
        """`LoraStack.key` of what the engine computes with; None when that is not known, or nothing is loaded."""
        return self._applied

    def applied(self, stack: LoraStack) -> bool:
        """Whether the engine computes with this stack now."""
        return self.loaded and self._applied == stack.key

    def __call__(self, inputs: Any) -> Tensor:
        """Run one forward: the family's own inputs -> (B, C, h, w), see `families.base.Forward`.

        Always in inference mode: going from one grad mode to another would compile again.

        Raises:
            EngineStateError: the weights are not loaded.
        """
        if self._forward is None:
            raise EngineStateError("forward before load: call Engine.load first.")
        with torch.inference_mode(), self.compiler.scope():
            return self._forward(inputs)
