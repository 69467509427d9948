"""torch.compile for one engine: by region, once, whatever LoRA, resolution, prompt length or batch comes.

Nothing process-wide is set: dynamo's, inductor's and the shape environment's options are patched around an engine's own
calls. A compiler that fails costs speed, never the picture: the engine goes on without it.
"""

from __future__ import annotations

import errno
import functools
import inspect
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, nn

from ..hardware import Hardware
from .cache import CompiledFiles
from .region import CompilerError, JustInTime, NotStorable, Precompiled

# Private names, in force only around our own calls, all checked by tests/test_engine.py:
# One region serves every block of its type and every variant of its inputs, so the default limit of 8 is near. Floats
# (a norm's epsilon) are constants: as inputs they are traced, found to be of no use, and everything is traced a second
# time. With duck shapes, a prompt length that equals another size (3072 tokens, hidden 3072) would become it.
DYNAMO_OPTIONS = {
    "recompile_limit": 64,
    "specialize_float": True,
}
SHAPE_OPTIONS = {"use_duck_shape": False}
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
TOLERANCE = 6e-2
SMALLEST = torch.finfo(torch.float32).tiny
FIRST_TIME = "the first time with this kind of model and these settings"


class CompileObserver(Protocol):
    """Hears of compiles: they take tens of seconds, so a user wants to know."""

    def notice(self, text: str, warning: bool) -> None:
        """Something that a user should know: the compiler does not work, or what it stored is damaged."""

    def compiling(self, region: str) -> None:
        """A region begins to trace and compile, and nothing of it was compiled before."""

    def compiled(self, region: str, seconds: float, count: int, why: str) -> None:
        """A call compiled; `seconds` is that call, `count` the engine's compiles so far."""


class RegionCompiler:
    """Compiles functions over blocks for one engine, and counts it."""

    def __init__(self, mode: str, observer: CompileObserver, files: CompiledFiles | None = None) -> None:
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
        """Wrap a function `f(block, *tensors)`, each tensor batch-first. Call the result only inside `scope`."""
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
            args = tuple(_contiguous(arg) for arg in args)
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

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Put dynamo's options in force for the calls inside."""
        with ExitStack() as stack:
            if self.enabled:
                stack.enter_context(torch._dynamo.config.patch(DYNAMO_OPTIONS))
                stack.enter_context(torch.fx.experimental._config.patch(SHAPE_OPTIONS))
            yield

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
                    f"the {function.__name__} blocks cannot be stored with this PyTorch ({_reason(exc)}): every start "
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
            out_of_memory = _cause(exc, torch.OutOfMemoryError)
            if out_of_memory is not None and out_of_memory is not exc:
                raise out_of_memory from exc
            if not is_compiler_failure(exc):
                raise
            failed = exc
        # Before anything is blamed on the compiler: what is wrong with the computation itself raises here.
        result = function(block, *args)
        self.failure = _reason(failed)
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
        if distance <= TOLERANCE:
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
        if self.files is None or not is_compiler_failure(exc) or _names_cause(exc):
            return False
        self.files.start_afresh()
        return True

    @contextmanager
    def _kernel_folder(self) -> Iterator[None]:
        if self.files is None:
            yield
        else:
            with self.files.inductor_folder():
                yield

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


def compiler_for(hardware: Hardware) -> str:
    """What torch.compile needs on a device, in a few words."""
    if hardware.kind == "cpu":
        return "a C++ compiler"
    return {"mps": "nothing more (early Metal support)"}.get(hardware.kind, "Triton")


def is_compiler_failure(exc: BaseException) -> bool:
    """Whether an error says that something could not be compiled, not that the computation itself is wrong."""
    if isinstance(exc, torch._dynamo.exc.RecompileError):  # what `error_on_recompile` asks for
        return False
    dynamo = torch._dynamo.exc
    if isinstance(exc, (CompilerError, dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit)):
        return True
    # Kernels that are compiled at their first launch, and code that inductor left behind, raise errors of their own.
    module = type(exc).__module__ or ""
    return module.startswith(("triton.", "torch._inductor.")) or isinstance(exc, (BrokenProcessPool, ImportError))


def failure_notice(region: str, exc: BaseException) -> str:
    """One sentence on what failed, one on what happens now, one on what to do."""
    return (
        f"torch.compile could not compile the {region} blocks on this machine ({_reason(exc)}). The model goes on "
        f"without compiling: the same pictures, but slower. {_advice(exc)} Or set 'compile' to 'off' in Accelerated "
        "Flux Loader."
    )


def _advice(exc: BaseException) -> str:
    text = " ".join(f"{type(each).__name__} {each}" for each in _chain(exc))
    full = _cause(exc, OSError)
    if full is not None and full.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Free space on the disk of '{full.filename or os.environ.get('TORCHINDUCTOR_CACHE_DIR', 'temp')}'."
    if _cause(exc, BrokenProcessPool) is not None:
        return "A compile worker was ended, as systems do when memory is short: close other programs and restart."
    if "fp8e4nv" in text:
        return "This card's compiled code reads no 8-bit floats: choose int8_weight_only in Quantize Transformer."
    if "triton" in text.lower():
        return "Install Triton: pip install triton on Linux, pip install triton-windows on Windows; then restart."
    if any(word in text for word in ("CppCompileError", "InvalidCxxCompiler", "C++ compiler", "cl is not found")):
        return {
            "Windows": "Install the C++ workload of Visual Studio Build Tools, and start ComfyUI from its command "
            "prompt (\"x64 Native Tools\").",
            "Darwin": "Install a C++ compiler: xcode-select --install; then restart.",
        }.get(platform.system(), "Install a C++ compiler (on Debian and Ubuntu: apt install g++); then restart.")
    return "Update torch, or delete its cache of compiled code, and restart."


def _names_cause(exc: BaseException) -> bool:
    """Whether the advice is more than a guess, so that another attempt would end the same way."""
    return not _advice(exc).startswith("Update")


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = getattr(exc, "inner_exception", None) or exc.__cause__


def _cause(exc: BaseException, kind: type) -> Any:
    return next((each for each in _chain(exc) if isinstance(each, kind)), None)


def _reason(exc: BaseException) -> str:
    *_, innermost = _chain(exc)
    line = next((line.strip() for line in str(innermost).splitlines() if line.strip()), "")
    return f"{type(innermost).__name__}: {line}"


def _contiguous(arg: Any) -> Any:
    """Compiled code is bound to strides, and a patch between blocks may hand on a slice."""
    return arg.contiguous() if isinstance(arg, Tensor) and arg.ndim in (2, 3) else arg


@functools.cache
def batch_can_be_unbacked() -> bool:
    """Whether one graph serves batch 1 and larger ones."""
    # Sharing one unbacked symbol among several inputs came with torch 2.11; without it, batch 1 and larger batches
    # compile one graph each.
    return "shape_id" in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters


def mark_batch(args: Sequence[Any]) -> None:
    """Let one graph serve batch 1 and every other: ComfyUI's batch flips when conditions are joined or not."""
    if not batch_can_be_unbacked():
        return
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.ndim in (2, 3):
            torch._dynamo.decorators.mark_unbacked(tensor, 0, shape_id="batch")
