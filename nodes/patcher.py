"""An engine's ModelPatcher: the MODEL that flows through a graph, and its place in ComfyUI's memory management."""

from __future__ import annotations

import logging
import math
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..accel.engine import Engine
from ..accel.errors import LoraError, SettingsError
from ..accel.lora.adapter import Adapter
from ..accel.lora.schedule import Keyframes, Playback, ScheduledStack
from ..accel.lora.stack import LoraStack
from ..accel.offload.planner import Planner
from ..accel.prefetch import Prefetcher
from ..accel.step_cache import StepCache, StepCacheSettings
from .native_lora import chosen_lora
from .offload import further_reserve, out_of_memory
from .prefetch import prefetcher_for
from .progress import show_text
from .sampling import SamplingRecord, summary

log = logging.getLogger(__name__)

MERGING = (
    "The accelerated FLUX model cannot be merged with another. Merge with ComfyUI's Load Diffusion Model, save the "
    "result, and load that file here."
)


# ComfyUI writes 1e32 for "whatever it needs".
UNLIMITED = 1e30


class AcceleratedModelPatcher(comfy.model_patcher.ModelPatcher):
    """A cheap handle on a shared engine, with a LoRA stack of its own.

    Clones share the engine; the stack is bound when a clone starts to sample. ComfyUI decides when the engine is loaded
    and unloaded, through `partially_load` and `detach`.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Take whatever arguments ModelPatcher has in this version of ComfyUI: its `clone` calls this.

        Args:
            model: an `AcceleratedFlux`.
            args: as ModelPatcher's, the load device and the offload device first.
            kwargs: likewise.
        """
        super().__init__(model, *args, **kwargs)
        self.loras = ScheduledStack()
        self.step_cache: StepCacheSettings | None = None
        self._playback: Playback | None = None
        self._prefetcher: Prefetcher | None = None

    @property
    def engine(self) -> Engine:
        """The engine that all clones share."""
        return self.model.diffusion_model.engine

    @property
    def planner(self) -> Planner:
        """What decides how much of the device it takes."""
        return self.model.planner

    def clone(self, *args: Any, **kwargs: Any) -> AcceleratedModelPatcher:
        """Copy the handle, not the engine."""
        copy = super().clone(*args, **kwargs)
        copy.loras = self.loras
        copy.step_cache = self.step_cache
        self.model.handles += 1
        weakref.finalize(copy, _forget, weakref.ref(self.model)).atexit = False
        return copy

    def with_step_cache(self, settings: StepCacheSettings) -> AcceleratedModelPatcher:
        """A clone that skips steps; at threshold 0 one that does not."""
        copy = self.clone()
        copy.step_cache = settings if settings.threshold else None
        return copy

    def with_lora(
        self, weights: Adapter, strength: float, keyframes: Keyframes = ()
    ) -> AcceleratedModelPatcher:
        """A clone with one more LoRA on its stack."""
        copy = self.clone()
        copy.loras = self.loras.with_lora(weights, strength, keyframes)
        return copy

    def with_max_rank(self, max_rank: int) -> AcceleratedModelPatcher:
        """A clone whose stack is cut to a rank; 0 changes nothing."""
        copy = self.clone()
        if max_rank:
            copy.loras = self.loras.with_max_rank(max_rank)
        return copy

    def add_patches(
        self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0, *_: Any, **__: Any
    ) -> list[Any]:
        """Put a LoRA from any of ComfyUI's loaders on this clone's stack, where ComfyUI would merge it.

        Returns:
            The keys that were taken.

        Raises:
            SettingsError: the weights themselves should be scaled, as model merging does.
            LoraError: see `NativeLoras.read`.
        """
        if strength_model != 1.0:
            raise SettingsError(MERGING)
        name = chosen_lora()
        try:
            weights, keys = self.model.native_loras.read(patches)
        except LoraError as exc:
            raise LoraError(str(exc).replace("LoRA: ", f"LoRA '{name}': ", 1) if name else str(exc)) from exc
        if weights is not None:
            self.loras = self.loras.with_lora(replace(weights, label=name), strength_patch)
            self.patches_uuid = uuid.uuid4()
        return keys

    # Memory: ComfyUI asks for sizes, and says when to load and when to give way.

    def model_size(self, *_: Any, **__: Any) -> int:
        """Bytes that the engine takes of the device when nothing disturbs it."""
        return max(self.planner.wanted_bytes, self.loaded_size())

    def loaded_size(self, *_: Any, **__: Any) -> int:
        """Bytes that it takes now."""
        return self.engine.device_bytes + self.engine.lora_bytes

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, *_: Any, **__: Any) -> int:
        """Load the engine, or bring as many more blocks as the memory allows. Returns the bytes gained.

        Args:
            device_to: the GPU.
            extra_memory: what ComfyUI lets it take beyond what it has; less than 0 to give some back.
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

    # Sampling.

    def pre_run(self, *args: Any, **kwargs: Any) -> None:
        """Bind this clone's LoRAs: ComfyUI calls it once per sampling, after loading."""
        other = self.model.current_patcher
        if other is not None and other is not self and other.loras.key != self.loras.key:
            log.warning(
                "Flux Hotswap: two models with different LoRAs (%s; %s) sample at once on one engine, as Dual Model "
                "Guider does; both will use the second. Give one of them a loader with another dtype or compile mode.",
                other.loras,
                self.loras,
            )
        super().pre_run(*args, **kwargs)
        engine = self.engine
        step_cache = None if self.step_cache is None else self._new_step_cache(self.step_cache)
        self.model.sampling_record = SamplingRecord(engine, step_cache)
        if not engine.loaded:
            self._load()
        if self.loras.varies:
            self._playback = Playback(self.loras, self.model.model_sampling.percent_to_sigma)
            # All of them now, the first one last, so that a change between two steps only binds.
            for stack in reversed(list(self.loras.stacks())):
                self._apply(stack)
        else:
            self._playback = None
            self._apply(self.loras.stack)
        self._prefetcher = prefetcher_for(engine)
        self._prefetcher.start()

    def ensure_applied(self, transformer_options: dict[str, Any] | None) -> None:
        """Before each call of the model: load the engine and bind the LoRAs of this step, if either is not so already.

        Args:
            transformer_options: of the call; a schedule reads `sigmas` and `sample_sigmas` from them.
        """
        if not self.engine.loaded:
            self._load()
        options = transformer_options or {}
        if self._playback is None:
            self._apply(self.loras.stack)
        elif "sigmas" in options:
            sigma = float(options["sigmas"][0])
            first = options.get("sample_sigmas")
            self._apply(self._playback.at(sigma, sigma if first is None else float(first.max())))

    def _new_step_cache(self, settings: StepCacheSettings) -> StepCache:
        sigma_of = self.model.model_sampling.percent_to_sigma
        start = float(sigma_of(settings.start_percent)) if settings.start_percent > 0.0 else math.inf
        end = float(sigma_of(settings.end_percent)) if settings.end_percent < 1.0 else -math.inf
        return StepCache(settings, start, end)

    def _apply(self, stack: LoraStack) -> None:
        if not self.engine.applied(stack):
            with self._explaining(f"bringing LoRAs {stack} there"):
                self.model.sampling_record.swaps.append(self.engine.swap(stack))

    def cleanup(self, *args: Any, **kwargs: Any) -> None:
        """Say what the sampling did. The LoRAs stay bound: the next prompt may want them again."""
        super().cleanup(*args, **kwargs)
        self._playback = None
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None
        if self.planner.offload.mode == "model":
            self.engine.offload()
        record, self.model.sampling_record = getattr(self.model, "sampling_record", None), None
        if record is None or not record.calls:
            return  # it failed before the first step, and the error says how
        # ComfyUI calls this in a `finally`.
        sampling = record.finished(self.loras, sys.exc_info()[1])
        self.model.samplings.append(sampling)
        line = summary(sampling, self.loras.stack.max_rank)
        log.info("Flux Hotswap: %s", line)
        show_text(line)

    def _load(self, device_bytes: float | None = None) -> None:
        """Load, or move blocks, by a plan for so much of the device; by default for what is free."""
        engine, planner = self.engine, self.planner
        if device_bytes is None:
            free = comfy.model_management.get_free_memory(self.load_device)
            device_bytes = self.loaded_size() + free - comfy.model_management.minimum_inference_memory()
        changed = planner.allow(device_bytes - further_reserve(planner.offload), engine.lora_bytes)
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
        try:
            yield
        except torch.OutOfMemoryError as exc:
            exc.__traceback__ = None  # its frames hold tensors
            raise out_of_memory(self.engine, self.planner, what) from exc

    # What cannot be done to an engine, with what to do instead.

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> None:
        """Refuse weight hooks."""
        raise SettingsError(
            "The accelerated FLUX model does not take LoRAs scheduled as hooks on the conditioning. Use Hotswap LoRA "
            "on the model, or ComfyUI's Load Diffusion Model for this graph."
        )

    def get_key_patches(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse merging of models."""
        raise SettingsError(MERGING)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse saving."""
        raise SettingsError(
            "The accelerated FLUX model cannot be saved: it holds the weights of its file unchanged. Copy "
            f"'{self.engine.spec.file.name}', or save from ComfyUI's Load Diffusion Model."
        )

    model_state_dict_for_saving = state_dict_for_saving

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> AcceleratedModelPatcher:
        """Refuse copies on further GPUs."""
        raise SettingsError("The accelerated FLUX model runs on one GPU. Remove the multi-GPU node from its path.")

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any, *args: Any, **kwargs: Any) -> None:
        """Take any wrapper but that of TorchCompileModel: the engine is compiled already, and better."""
        if key == "torch.compile":
            log.warning(
                "Flux Hotswap: TorchCompileModel has no effect on the accelerated model, which compiles itself (see "
                "'compile' in Accelerated Flux Loader)."
            )
            return
        super().add_wrapper_with_key(wrapper_type, key, wrapper, *args, **kwargs)

    def set_injections(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Take any injection but that of the bypass loader, which replaces the forward of modules that do not run."""
        if key == "bypass_lora":
            raise SettingsError(
                "Load LoRA (Bypass) does not work on the accelerated FLUX model, and is not needed: Load LoRA and "
                "Hotswap LoRA leave its weights untouched. Use one of them."
            )
        super().set_injections(key, *args, **kwargs)

    def add_object_patch(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Take any object patch, and warn of those on parts of the transformer, which compute nothing here."""
        if name.startswith("diffusion_model."):
            log.warning(
                "Flux Hotswap: a node replaces %s, which has no effect on the accelerated model. For this effect use "
                "ComfyUI's Load Diffusion Model.",
                name,
            )
        super().add_object_patch(name, *args, **kwargs)


def _forget(model: weakref.ref) -> None:
    """A clone is gone. With the last one, an engine that ComfyUI unloaded leaves host memory, too.

    So does any other model of ComfyUI's: /free drops its weights with the outputs of the nodes. What is compiled stays.
    """
    found = model()
    if found is not None:
        found.handles -= 1
        if not found.handles and found.unloaded:
            found.diffusion_model.engine.release()
