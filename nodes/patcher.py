"""The MODEL that flows through a graph: a handle on an engine with a LoRA stack of its own, bound when it samples."""

from __future__ import annotations

import logging
import math
import sys
import uuid
from dataclasses import replace
from typing import Any

from ..accel.errors import LoraError, SettingsError
from ..accel.lora.adapter import Adapter
from ..accel.lora.schedule import Keyframes, Playback, ScheduledStack
from ..accel.lora.stack import LoraStack
from ..accel.prefetch import Prefetcher
from ..accel.step_cache import StepCache, StepCacheSettings
from .native_lora import chosen_lora
from .prefetch import prefetcher_for
from .progress import say
from .residency import ResidentPatcher
from .sampling import SamplingRecord, summary

log = logging.getLogger(__name__)


def accelerated(model: Any, node: str, otherwise: str) -> AcceleratedModelPatcher:
    """A node's MODEL, if it is one of ours.

    Args:
        model: what the node got.
        node: its name.
        otherwise: what to do with another model, as a sentence.

    Raises:
        SettingsError: it is not.
    """
    if not isinstance(model, AcceleratedModelPatcher):
        raise SettingsError(
            f"{node} got a model of type {type(model.model).__name__}, expected one from Accelerated Flux Loader. "
            f"{otherwise}"
        )
    return model


class AcceleratedModelPatcher(ResidentPatcher):
    """A cheap handle on a shared engine, with a LoRA stack of its own.

    Clones share the engine; the stack is bound when a clone starts to sample. ComfyUI calls for each sampling:
    `partially_load`, `pre_run`, then its model, which calls `ensure_applied` each time, and `cleanup`.

    ComfyUI's interface has some thirty methods that an engine must answer, so they are spread over three classes:
    `LimitedPatcher` refuses, `ResidentPatcher` loads and unloads, and this one samples with LoRAs.

    Attributes:
        loras: the stack; never changed in place.
        step_cache: whether and when steps are skipped; None: never.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Take whatever arguments ModelPatcher has in this version of ComfyUI: its `clone` calls this.

        Args:
            model: an `AcceleratedModel`.
            args: as ModelPatcher's, the load device and the offload device first.
            kwargs: likewise.
        """
        super().__init__(model, *args, **kwargs)
        self.loras = ScheduledStack()
        self.step_cache: StepCacheSettings | None = None
        self._playback: Playback | None = None
        self._prefetcher: Prefetcher | None = None

    def clone(self, *args: Any, **kwargs: Any) -> AcceleratedModelPatcher:
        """Copy the handle and its stack, not the engine."""
        copy = super().clone(*args, **kwargs)
        copy.loras = self.loras
        copy.step_cache = self.step_cache
        return copy

    def with_step_cache(self, settings: StepCacheSettings) -> AcceleratedModelPatcher:
        """A clone that skips steps; at threshold 0 one that does not."""
        copy = self.clone()
        copy.step_cache = settings if settings.threshold else None
        return copy

    def with_lora(
        self, adapter: Adapter, strength: float, keyframes: Keyframes = ()
    ) -> AcceleratedModelPatcher:
        """A clone with one more LoRA on its stack.

        Args:
            adapter: what was read of the LoRA's file.
            strength: what its change is multiplied by.
            keyframes: how the strength changes while a picture is sampled; none: it stays.
        """
        copy = self.clone()
        copy.loras = self.loras.with_lora(adapter, strength, keyframes)
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
            raise self._no_merging()
        name = chosen_lora()
        try:
            adapter, keys = self.model.native_loras.read(patches)
        except LoraError as exc:
            raise LoraError(str(exc).replace("LoRA: ", f"LoRA '{name}': ", 1) if name else str(exc)) from exc
        if adapter is not None:
            self.loras = self.loras.with_lora(replace(adapter, label=name), strength_patch)
            self.patches_uuid = uuid.uuid4()
        return keys

    def pre_run(self, *args: Any, **kwargs: Any) -> None:
        """Bind this clone's LoRAs: ComfyUI calls it once per sampling, after loading."""
        self._warn_of_another_sampling()
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

    def cleanup(self, *args: Any, **kwargs: Any) -> None:
        """Say what the sampling did. The LoRAs stay bound: the next prompt may want them again."""
        super().cleanup(*args, **kwargs)
        self._playback = None
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None
        if self.planner.offload.mode == "model":
            self.engine.offload()
        record, self.model.sampling_record = self.model.sampling_record, None
        if record is None or not record.calls:
            return  # it failed before the first step, and the error says how
        # ComfyUI calls this in a `finally`.
        sampling = record.finished(self.loras, sys.exc_info()[1])
        self.model.samplings.append(sampling)
        say(summary(sampling, self.loras.stack.max_rank))

    def _warn_of_another_sampling(self) -> None:
        other = self.model.current_patcher
        if other is not None and other is not self and other.loras.key != self.loras.key:
            log.warning(
                "Flux Hotswap: two models with different LoRAs (%s; %s) sample at once on one engine, as Dual Model "
                "Guider does; both will use the second. Give one of them a loader with another dtype or compile mode.",
                other.loras,
                self.loras,
            )

    def _new_step_cache(self, settings: StepCacheSettings) -> StepCache:
        sigma_of = self.model.model_sampling.percent_to_sigma
        start = float(sigma_of(settings.start_percent)) if settings.start_percent > 0.0 else math.inf
        end = float(sigma_of(settings.end_percent)) if settings.end_percent < 1.0 else -math.inf
        return StepCache(settings, start, end)

    def _apply(self, stack: LoraStack) -> None:
        if not self.engine.applied(stack):
            with self._explaining(f"bringing LoRAs {stack} there"):
                self.model.sampling_record.swaps.append(self.engine.swap(stack))
