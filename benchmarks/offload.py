"""A step of FLUX.1-dev that does not fit the device: the copies of its blocks, its computation, and both at once.

On a CPU a pool of host memory stands for the device, a thread for the copy stream; every byte is really copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.memory.base import DeviceMemory
from accel.memory.budgets import GB, available_host_bytes
from accel.offload.plan import OffloadPlan
from accel.settings import EngineSettings, Offload, Quantization

from .device_memory import start_peak
from .flux_loras import DTYPE
from .offload_case import NAMES, Case, case_of, memory_for, plan_of
from .offload_report import report_of
from .random_checkpoint import random_spec
from .report import BenchmarkError, OtherLoad, Report
from .timing import Stopwatch, Variant, interleave_timed

# Beside the weights: Python, libraries, activations, a block twice.
HOST_MARGIN_BYTES = 3 * GB


def run(quick: bool, scale: float = 1.0, device: str = "cpu") -> Report:
    """Load random weights by a plan, and time the parts of a step in turn.

    Args:
        quick: a narrow model, not compiled.
        scale: share of FLUX.1-dev's blocks.
        device: where it runs.

    Raises:
        BenchmarkError: there is not the memory, or a step did something else than planned.
    """
    case = case_of(quick, scale, torch.device(device))
    planned = plan_of(case)
    needed = planned.weights_bytes + HOST_MARGIN_BYTES
    if not quick and available_host_bytes() < needed:
        raise BenchmarkError(
            f"it needs {needed / GB:.0f} GB of memory for distinct bytes of all blocks, "
            f"{available_host_bytes() / GB:.0f} GB are free: run it later, or with a smaller --scale."
        )
    load = OtherLoad()
    memory = memory_for(case, planned.plan)
    samples = Steps(case, planned.plan, memory).measure()
    return report_of(case, planned, memory, samples, load.share())


class Steps:
    """One engine, and the three parts of its step that are timed."""

    def __init__(self, case: Case, plan: OffloadPlan, memory: DeviceMemory) -> None:
        """Draw with all weights on the device; then load by the plan, and compile by running once."""
        self._case = case
        self._plan = plan
        self._memory = memory
        self._inputs = _inputs(case, memory.device)
        self._expected = self._resident()
        self._engine = self._made(plan, memory)
        self._engine(self._inputs)

    def _made(self, plan: OffloadPlan | None, memory: DeviceMemory | None) -> Engine:
        case = self._case
        quantization = Quantization(case.mode)
        settings = EngineSettings(
            compile=case.compile, device=str(case.device), quantization=quantization, offload=Offload("stream")
        )
        engine = Engine(random_spec(case.config, case.device), settings, plan=plan, memory=memory)
        engine.load()
        return engine

    def _resident(self) -> Tensor:
        engine = self._made(None, None)
        output = engine(self._inputs).clone()
        if not output.isfinite().all():
            raise BenchmarkError("the output of random weights is not finite.")
        engine.release()
        del engine
        start_peak(self._case.device)
        return output

    def measure(self, ends: float | None = None) -> dict[str, list[float]]:
        """Seconds of each part, in turn.

        Args:
            ends: begin no further round after this time (`time.monotonic`), if each has a sample.

        Raises:
            BenchmarkError: a step copied other bytes than planned, or computed something else than the resident model.
        """
        parts = zip(NAMES, (self._copy, self._compute, self._stream), strict=True)
        variants = [Variant(name, part) for name, part in parts]
        last = variants[-1]
        variants[-1] = replace(last, check=self._check)
        timed = interleave_timed(variants, self._case.rounds, 1, Stopwatch(self._case.device), ends)
        return {name: [sample.done_ms / 1e3 for sample in samples] for name, samples in timed.items()}

    def _copy(self) -> None:
        """All copies of one step, without what they are for."""
        ring = self._engine.assembled.weights.ring
        for block in range(self._plan.total_blocks):
            ring.enter(block)
            ring.leave(block)
        self._memory.finish()

    def _compute(self) -> None:
        """All blocks, each with whatever weights lie in its buffer."""
        with _Replaced(self._memory, "copy", lambda target, chunks, after: self._memory.mark()):
            self._engine(self._inputs)
        # What it did not copy counts as there: the next step must not believe that.
        for slot in self._engine.assembled.weights.ring._slots:
            slot.holds = None

    def _stream(self) -> None:
        before = self._engine.assembled.weights.ring.copied_bytes
        self._output = self._engine(self._inputs)
        self._memory.finish()
        self._copied = self._engine.assembled.weights.ring.copied_bytes - before

    def _check(self) -> None:
        for slot in self._engine.assembled.weights.ring._slots:
            for start, chunk in self._engine.assembled.weights.ring._sources[slot.holds]:
                there = slot.buffer[start : start + chunk.numel()]
                if not torch.equal(there, chunk.to(there.device)):
                    raise BenchmarkError("the bytes of a block did not arrive.")
        # The buffers were empty before, so the first blocks come once more.
        if not 0 <= self._copied - self._plan.copied_bytes_per_step <= self._plan.device_bytes:
            raise BenchmarkError(
                f"a step copied {self._copied:,} bytes, planned were {self._plan.copied_bytes_per_step:,}."
            )
        if not torch.equal(self._output, self._expected):
            raise BenchmarkError("a streamed step computed something else than the resident model.")


class _Replaced:
    """Puts a function in another's place for the length of a `with`."""

    def __init__(self, owner: object, name: str, function: Callable) -> None:
        self._owner, self._name, self._function = owner, name, function

    def __enter__(self) -> None:
        setattr(self._owner, self._name, self._function)

    def __exit__(self, *_: object) -> None:
        delattr(self._owner, self._name)


def _inputs(case: Case, device: torch.device) -> Flux1Inputs:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=generator)

    return Flux1Inputs(
        latent=normal(1, 16, case.latent, case.latent),
        timestep=torch.full((1,), 0.7, device=device),
        encoder_hidden_states=normal(1, case.text_tokens, case.config.context_dim),
        pooled_projections=normal(1, case.config.pooled_dim),
        guidance=torch.full((1,), 3.5, device=device),
    )
