"""torch.compile for one engine: by region, once, whatever LoRA, resolution, prompt length or batch comes.

No option of torch stays changed: dynamo's, inductor's and the shape environment's are in force around an engine's own
calls only. Two things reach further than a call's own arguments: while a region compiles, the environment names this
engine's folder of kernels (`cache.CompiledFiles.inductor_folder`, which puts it back); and a class of quantized weights
that lacks `empty_like` gets it for good (`region`, as nothing over it could be stored otherwise).

A compiler that fails costs speed, never the picture: the engine goes on without it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from ..observer import Observer
from .cache import CompiledFiles
from .failures import (
    CompilerError,
    NotStorable,
    cause,
    failure_notice,
    has_known_cause,
    is_compiler_failure,
    reason,
)
from .region import JustInTime, Precompiled
from .tracing import contiguous, mark_batch, tracing_options

# Of inductor, for one compile. No CUDA graphs: they need fixed addresses, and each LoRA has its own.
INDUCTOR_OPTIONS = {
    "regional": {},
    "regional max-autotune": {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "triton.cudagraphs": False,
    },
    "full": {},
}
# How far compiled blocks may be from uncompiled ones, relative L2. Compiled code rounds fewer intermediate results to
# bfloat16; where activations are quantized, some fall on the other side of a step: 0.017 was seen (int8, 2026-11-26).
MAX_DISTANCE = 6e-2
SMALLEST = torch.finfo(torch.float32).tiny
FIRST_TIME = "the first time with this kind of model and these settings"


class RegionCompiler:
    """Compiles functions over blocks for one engine, and counts it."""

    def __init__(self, mode: str, observer: Observer, files: CompiledFiles | None = None) -> None:
        """Compile as `settings.COMPILE_MODES` says.

        Args:
            mode: one of `settings.COMPILE_MODES`.
            observer: hears of compiles, and of a compiler that fails.
            files: see the attribute.

        Attributes:
            files: where compiled code is kept for the next start; None leaves that to inductor's own cache. Set it
                before the first `region`.
            count: finished compiles.
            recompiles: those of a region that was compiled before.
            seconds: what the calls that compiled took.
            failure: why this engine runs without compiling although it was asked to, or None.
        """
        self.enabled = mode != "off"
        self.count = 0
        self.recompiles = 0
        self.seconds = 0.0
        self.failure: str | None = None
        self._options = INDUCTOR_OPTIONS.get(mode, {})
        self._observer = observer
        self.files = files

    def region(self, function: Callable) -> Callable:
        """Wrap a function; call the result only inside `scope`.

        Args:
            function: `f(block, *inputs)`; what of the inputs is batch-first says `tracing.is_batch_first`.
        """
        if not self.enabled:
            return function
        name = function.__name__
        stores = self.files is not None and Precompiled.possible(function)
        compiled = Precompiled(function, self._backend, self.files) if stores else self._just_in_time(function)
        known = False

        @functools.wraps(function)
        def call(block: nn.Module, *args: Any) -> Any:
            nonlocal compiled, known
            if self.failure is not None:
                return function(block, *args)
            args = tuple(contiguous(arg) for arg in args)
            run = compiled.find(block, args)
            if run is not None:
                known = True
                return run(block, *args)
            mark_batch(args)
            before, start = self.count, time.perf_counter()
            if not known and not compiled.stored:
                self._observer.compiling(name)
            result, compiled = self._compile_and_run(function, compiled, block, args)
            if self.count != before and self.failure is None:
                result = self._compared(function, block, args, result)
            if self.count != before and self.failure is None:
                self.recompiles += known
                known = True
                seconds = time.perf_counter() - start
                self.seconds += seconds
                self._observer.compiled(name, seconds, self.count, compiled.reason or FIRST_TIME)
            return result

        return call

    def scope(self) -> AbstractContextManager[None]:
        """Dynamo's options, in force for the calls inside."""
        return tracing_options() if self.enabled else nullcontext()

    def _compile_and_run(
        self, function: Callable, compiled: JustInTime | Precompiled, block: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, JustInTime | Precompiled]:
        """Compile what these inputs need and run it, or run it without: (result, what serves the next call)."""
        try:
            try:
                with self._kernel_folder():
                    return compiled(block, args), compiled
            except NotStorable as exc:
                self._observer.notice(
                    f"the {function.__name__} blocks cannot be stored with this PyTorch ({reason(exc)}): every start "
                    "compiles them again.",
                    True,
                )
            except Exception as exc:
                if not self._may_start_afresh(exc):
                    raise  # otherwise what was stored may be what is broken
            compiled = self._just_in_time(function)
            with self._kernel_folder():
                return compiled(block, args), compiled
        except Exception as exc:
            out_of_memory = cause(exc, torch.OutOfMemoryError)
            if out_of_memory is not None and out_of_memory is not exc:
                raise out_of_memory from exc
            if not is_compiler_failure(exc):
                raise
            failed = exc
        # Before anything is blamed on the compiler: what is wrong with the computation itself raises here.
        result = function(block, *args)
        self.failure = reason(failed)
        self._observer.notice(failure_notice(function.__name__, failed), True)
        return result, compiled

    def _compared(self, function: Callable, block: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        """Compare what was compiled just now with the same block uncompiled. From a difference on, do without it."""
        try:
            expected = function(block, *args)
        except torch.OutOfMemoryError:
            self._observer.notice(
                f"the compiled {function.__name__} blocks were not compared with uncompiled ones: the device has no "
                "room for both.",
                False,
            )
            return result
        distance = _distance(result, expected)
        if distance <= MAX_DISTANCE:
            return result
        if self.files is not None:
            self.files.drop(function.__name__, ValueError("they compute wrong numbers"))
        self.failure = f"the compiled {function.__name__} blocks are {distance:.2g} from uncompiled ones (relative L2)"
        self._observer.notice(
            f"{self.failure}: what torch.compile makes of them is wrong on this machine. The model goes on without "
            "compiling: right pictures, but slower. Update torch, Triton and the GPU's driver, or set 'compile' to "
            "'off' in Accelerated Flux Loader.",
            True,
        )
        return expected

    def _just_in_time(self, function: Callable) -> JustInTime:
        return JustInTime(function, self._backend, self.files)

    def _may_start_afresh(self, exc: Exception) -> bool:
        if self.files is None or not is_compiler_failure(exc) or has_known_cause(exc):
            return False
        self.files.start_afresh()
        return True

    def _kernel_folder(self) -> AbstractContextManager[None]:
        return nullcontext() if self.files is None else self.files.inductor_folder()

    def _backend(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx  # takes a second to import

        try:
            compiled = compile_fx(graph, example_inputs, config_patches=self._options or None)
        except torch._dynamo.exc.TorchDynamoException:  # its own, such as the wish to trace again
            raise
        except Exception as exc:
            raise CompilerError from exc
        # Counted when done: dynamo may drop an attempt and trace again.
        self.count += 1
        return compiled


def _distance(result: Any, expected: Any) -> float:
    """Relative L2 distance of the tensors, the largest one; NaN is infinitely far, but from NaN."""
    if isinstance(expected, Tensor):
        length = float(torch.linalg.vector_norm(expected.float()))
        if not math.isfinite(length):
            return 0.0  # with such inputs uncompiled blocks fail as well, and say nothing
        distance = float(torch.linalg.vector_norm(result.float() - expected.float())) / max(length, SMALLEST)
        return math.inf if math.isnan(distance) else distance
    return max(map(_distance, result, expected))
