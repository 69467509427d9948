"""torch.compile for one engine: by region, once, whatever LoRA, resolution, prompt length or batch comes.

Nothing process-wide is set: dynamo's and the shape environment's options are patched around an engine's own calls.
"""

from __future__ import annotations

import functools
import inspect
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch._dynamo
import torch._inductor.exc
import torch.fx.experimental._config
from torch import Tensor, nn

from .errors import SettingsError

# Private names, in force only around our own calls, all checked by tests/test_engine.py:
# a LoRA's rank is a parameter's size, and parameters' sizes are constants unless the first two say otherwise. With duck
# shapes, a prompt length that equals another size (3072 tokens, hidden 3072) would become it. One region serves every
# block of its type and every variant of its inputs, so the default limit of 8 is near.
DYNAMO_OPTIONS = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "recompile_limit": 64,
}
SHAPE_OPTIONS = {"use_duck_shape": False}


class CompileObserver(Protocol):
    """Hears of compiles: they take tens of seconds, so a user wants to know."""

    def compiling(self, region: str) -> None:
        """The first call of a region begins; it traces and compiles."""

    def compiled(self, region: str, seconds: float, count: int) -> None:
        """A call compiled; `seconds` is that call, `count` the engine's compiles so far."""


class RegionCompiler:
    """Compiles block functions for one engine, and counts it."""

    def __init__(self, mode: str, observer: CompileObserver) -> None:
        """Compile as `settings.COMPILE_MODES` says.

        Attributes:
            count: finished compiles.
            recompiles: those of a region that was compiled before.
            seconds: what the calls that compiled took.
        """
        self.enabled = mode != "off"
        self.count = 0
        self.recompiles = 0
        self.seconds = 0.0
        self._observer = observer

    def region(self, function: Callable) -> Callable:
        """Wrap a block function `f(block, *tensors)`, each tensor batch-first. Call the result only inside `scope`."""
        if not self.enabled:
            return function
        # dynamo keeps compiled code with the code object, so two engines would see each other's guards, count each
        # other's compiles as recompiles, and outlive each other. A code object of its own parts them.
        own = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
        )
        compiled = torch.compile(own, backend=self._compile_counted, fullgraph=True, dynamic=True)
        name, known = function.__name__, False

        @functools.wraps(function)
        def call(block: nn.Module, *args: Any) -> Any:
            nonlocal known
            if not known:
                self._observer.compiling(name)
            _mark_batch(args)
            before, start = self.count, time.perf_counter()
            try:
                result = compiled(block, *args)
            except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as exc:
                raise SettingsError(
                    f"torch.compile could not compile the {name} blocks on this machine ({_first_line(exc)}). Set "
                    "'compile' to 'off' in Accelerated Flux Loader, or install what the compiler needs: a C++ compiler "
                    "on a CPU, Triton on a GPU (triton-windows on Windows)."
                ) from exc
            if self.count != before:
                self.recompiles += known
                known = True
                seconds = time.perf_counter() - start
                self.seconds += seconds
                self._observer.compiled(name, seconds, self.count)
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

    def _compile_counted(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx  # takes a second to import

        compiled = compile_fx(graph, example_inputs)
        # Counted when done: dynamo may drop an attempt and trace again.
        self.count += 1
        return compiled


def mark_weights_static(model: nn.Module) -> None:
    """Keep the sizes of a model's own weights constant in its compiled regions.

    Call it before LoRA layers are added: their ranks must stay symbols.
    """
    for parameter in model.parameters():
        torch._dynamo.mark_static(parameter)


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


@functools.cache
def _batch_can_be_unbacked() -> bool:
    # Sharing one unbacked symbol among several inputs came with torch 2.11; without it, batch 1 and larger batches
    # compile one graph each.
    return "shape_id" in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters


def _mark_batch(args: tuple[Any, ...]) -> None:
    """Let one graph serve batch 1 and every other: ComfyUI's batch flips when conditions are joined or not."""
    if not _batch_can_be_unbacked():
        return
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.ndim in (2, 3):
            torch._dynamo.decorators.mark_unbacked(tensor, 0, shape_id="batch")
