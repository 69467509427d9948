"""What happens while a sampler runs on an engine: noted call by call, told when it ends."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..accel.engine import Engine
from ..accel.history import Sampling, SwapReport
from ..accel.lora.schedule import ScheduledStack
from ..accel.step_cache import StepCache, StepCall


class SamplingRecord:
    """What happened on an engine since a sampler started.

    Attributes:
        swaps: every switch of LoRAs.
        calls: of the model.
    """

    def __init__(self, engine: Engine, step_cache: StepCache | None) -> None:
        """Start to count.

        Args:
            engine: what samples.
            step_cache: of this sampling; None: no steps are skipped.
        """
        self.swaps: list[SwapReport] = []
        self.calls = 0
        self._engine = engine
        self._step_cache = step_cache
        self._start = time.perf_counter()
        self._compiled = engine.compiler.count, engine.compiler.recompiles, engine.compiler.seconds
        self._size: tuple[int, ...] = ()
        self._steps = 0
        self._sigmas: torch.Tensor | None = None

    def note_call(self, shape: torch.Size, options: dict[str, Any]) -> Callable[[], StepCall] | None:
        """Note one call of the model, once its LoRAs are bound.

        Args:
            shape: (B, C, h, w) of its latents.
            options: its transformer options.

        Returns:
            What asks the step cache, if there is one.
        """
        sigmas, conditions = options.get("sigmas"), tuple(options.get("uuids", ()))
        self.calls += 1
        pixels = self._engine.spec.family.pixels_per_latent
        self._size = (shape[0] // max(1, len(conditions)), shape[-2] * pixels, shape[-1] * pixels)
        if sigmas is not self._sigmas:  # one tensor for all calls of a step
            self._steps, self._sigmas = self._steps + 1, sigmas
        if self._step_cache is None or sigmas is None:
            return None
        return functools.partial(self._step_cache.call, sigmas, conditions, self._engine.bound)

    def finished(self, loras: ScheduledStack, error: BaseException | None) -> Sampling:
        """What there was.

        Args:
            loras: that it sampled with.
            error: what ended it before its time.
        """
        seconds = time.perf_counter() - self._start
        engine, (compiles, recompiles, compile_s) = self._engine, self._compiled
        stopped = ""
        if error is not None:
            interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
            stopped = "interrupted" if interrupted else "failed"
        return Sampling(
            loras=str(loras),
            size=self._size,
            steps=self._steps,
            calls=self.calls,
            seconds=seconds,
            swaps=tuple(self.swaps),
            compiles=engine.compiler.count - compiles,
            recompiles=engine.compiler.recompiles - recompiles,
            compile_s=engine.compiler.seconds - compile_s,
            step_cache="" if self._step_cache is None else str(self._step_cache),
            stopped=stopped,
        )


def summary(sampling: Sampling, max_rank: int) -> str:
    """One line of it, for the log and the node.

    Args:
        sampling: what there was.
        max_rank: that its stack of LoRAs was cut to.
    """
    counts = Counter(swap.source for swap in sampling.swaps)
    sources = ", ".join(f"{count} × {source}" if count > 1 else source for source, count in counts.items())
    error = max((swap.error for swap in sampling.swaps), default=0.0)
    cut = f" cut to rank {max_rank} (error {error:.2%})" if error else ""
    stopped = f", {sampling.stopped} in step {sampling.steps}" if sampling.stopped else ""
    line = (
        f"LoRAs {sampling.loras}{cut} | swap {sampling.swap_s * 1e3:.2f} ms ({sources or 'already bound'}) | "
        f"compiled {sampling.compiles} | recompiles {sampling.recompiles} | sampling {sampling.seconds:.2f} s{stopped}"
    )
    return f"{line} | step cache {sampling.step_cache}" if sampling.step_cache else line
