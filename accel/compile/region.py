"""One region's compiled code: as torch.compile keeps it, or as it is stored for the next start.

torch.compile spends most of a warm start on tracing: seconds of Python, although the kernels lie on the disk. A stored
region is what tracing made, with the guards that say for which inputs it holds. The guards are checked at every call,
as dynamo does; inputs that none of the stored variants fits are traced and compiled anew.
"""

from __future__ import annotations

import inspect
import io
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from .cache import CompiledFiles
from .failures import CompilerError, NotStorable

Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable]
REASON_LENGTH = 160


class JustInTime:
    """A function under torch.compile as it is: dynamo finds out by itself what fits."""

    stored = False

    def __init__(self, function: Callable, backend: Backend, files: CompiledFiles | None = None) -> None:
        """Wrap a function; nothing is traced yet.

        Args:
            function: what to compile.
            backend: compiles what dynamo traced.
            files: keeps the kernels, if not the traces, for the next start.
        """
        # dynamo keeps compiled code with the code object, so two engines would see each other's guards, count each
        # other's compiles as recompiles, and outlive each other. A code object of its own parts them.
        self._compiled = torch.compile(_own(function), backend=self._compile, fullgraph=True, dynamic=True)
        self._backend = backend
        self._files = files
        self._compiles = 0

    def find(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Nothing: only dynamo knows what it has."""

    @property
    def reason(self) -> str:
        """Why the latest compile was needed, in dynamo's words; empty if it was the first."""
        metrics = torch._dynamo.utils.get_compilation_metrics()
        return _one_line(getattr(metrics[-1], "recompile_reason", None) or "") if metrics else ""

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run, after compiling if need be."""
        before = self._compiles
        result = self._compiled(block, *args)
        if self._compiles != before and self._files is not None:
            self._files.store_kernels()
        return result

    def _compile(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self._compiles += 1
        return self._backend(graph, example_inputs)


class Precompiled:
    """A function's variants, each made by dynamo once and stored, or read from what an earlier process stored.

    Attributes:
        reason: why the latest compile was needed; empty if it was the first.
    """

    def __init__(self, function: Callable, backend: Backend, files: CompiledFiles) -> None:
        """Wrap a function; what is stored of it is read at the first call, because it needs a block to be tied to."""
        self._function = _own(function)
        self._compiled = torch.compile(self._function, backend=backend, fullgraph=True, dynamic=True)
        self._names = list(inspect.signature(function).parameters)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._closure = {name: cell.cell_contents for name, cell in cells}
        self._files = files
        self._variants: list[_Variant] | None = None
        self.reason = ""

    @staticmethod
    def possible(function: Callable) -> bool:
        """Whether this torch can store what it compiles (2.9), and the function has plain parameters."""
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        return (
            kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
            and hasattr(torch.compiler, "load_compiled_function")
            and getattr(torch._dynamo.config, "enable_aot_compile", False)
        )

    @property
    def stored(self) -> bool:
        """Whether an earlier process left something of this region."""
        return bool(self._files.stored(self._function.__name__))

    def find(self, block: nn.Module, args: tuple[Any, ...]) -> Callable | None:
        """What runs `(block, *args)` without compiling, if there is such a variant."""
        if not self._variants:
            return None
        variant = self._fitting(self._locals(block, args))
        return None if variant is None else variant.run

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run the variant that fits; read or compile it first if need be.

        Raises:
            RecompileError: none fits, some exist, and `error_on_recompile` is set.
            NotStorable: this torch cannot store code over what the block holds.
        """
        values = self._locals(block, args)
        if self._variants is None:
            self._variants = self._stored(values)
        variant = self._fitting(values)
        if variant is None:
            variant = self._compile(block, args, values)
        return variant.run(block, *args)

    def _locals(self, block: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
        return {**self._closure, **dict(zip(self._names, (block, *args), strict=True))}

    def _fitting(self, values: dict[str, Any]) -> _Variant | None:
        return next((variant for variant in self._variants if variant.guards.check(values)), None)

    def _compile(self, block: nn.Module, args: tuple[Any, ...], values: dict[str, Any]) -> _Variant:
        self.reason = self._variants[-1].why_not(values) if self._variants else ""
        if self._variants and torch._dynamo.config.error_on_recompile:
            raise torch._dynamo.exc.RecompileError(f"{self._function.__name__}: {self.reason}")
        for parameter in block.parameters():
            _make_describable(parameter)
        try:
            made = self._compiled.aot_compile(((block, *args), {}))
            data = type(made).serialize(made, self._closure).serialized_data
        except (torch._dynamo.exc.TorchDynamoException, CompilerError):
            raise
        except Exception as exc:  # what cannot be stored raises whatever pickling it raises
            raise NotStorable from exc
        variant = _Variant(made)
        self._variants.append(variant)
        self._files.store(self._function.__name__, data)
        return variant

    def _stored(self, values: dict[str, Any]) -> list[_Variant]:
        variants = []
        for data in self._files.stored(self._function.__name__):
            try:
                made = torch.compiler.load_compiled_function(
                    io.BytesIO(data), f_globals=self._function.__globals__, external_data=self._closure
                )
                variants.append(_Variant(made, values))
            except Exception as exc:  # pickles of another state of the libraries raise whatever they like
                self._files.drop(self._function.__name__, exc)
        return variants


class _Variant:
    """Compiled code, and the guards that say for which inputs it holds."""

    def __init__(self, made: Any, values: dict[str, Any] | None = None) -> None:
        """Take what `aot_compile` made, or what was loaded (then with the inputs of the first call)."""
        artifacts = made._artifacts
        self.run = made.fn
        self.guards = artifacts.guard_manager
        if values is not None:
            self.guards = _guards_with_marks(made, values)

    def why_not(self, values: dict[str, Any]) -> str:
        """The first guard that does not hold."""
        parts = self.guards.check_verbose(values).verbose_code_parts
        return _one_line(parts[0]) if parts else ""


def _make_describable(parameter: Tensor) -> None:
    """Teach the class of a quantized weight `empty_like`, with which torch writes down what the guards compare.

    torchao's classes leave it out (0.18), so that nothing that is compiled over them could be stored (torch 2.14,
    GuardsStatePickler.reducer_override).
    """
    kind = type(parameter)
    if kind in (Tensor, nn.Parameter) or not hasattr(kind, "implements"):
        return
    try:
        torch.empty_like(parameter, device="meta")
    except NotImplementedError:

        @kind.implements(torch.ops.aten.empty_like.default)
        def _(func: Callable, types: object, args: tuple[Tensor], kwargs: dict[str, Any]) -> Tensor:
            weight = args[0]
            dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
            return torch.empty(weight.shape, dtype=dtype, device=device)


def _guards_with_marks(made: Any, values: dict[str, Any]) -> Any:
    """Build the guards of loaded code anew.

    Dynamo compares how dimensions are marked (dynamic, static, unbacked), but does not store the marks with the guards
    (seen in torch 2.14), so no input of ours would ever fit. Marks say how to trace, and nothing of what compiled code
    holds for: sizes, strides, types and devices have guards of their own, which are stored.
    """
    from torch._dynamo.package import load_guard_manager, load_guards_state

    with torch.inference_mode(False):  # a tensor that is made in it has fewer dispatch keys than a model's own
        state = load_guards_state(made._artifacts.guards_state)
    for name, stored in state.output_graph.local_scope.items():
        _copy_marks(values[name], stored)
    return load_guard_manager(state, made._artifacts.original_code, made.fn.__globals__)


def _copy_marks(actual: Any, stored: Any) -> None:
    if isinstance(stored, nn.Module):
        for name, child in (*stored._parameters.items(), *stored._buffers.items(), *stored._modules.items()):
            _copy_marks(getattr(actual, name, None), child)
    elif isinstance(stored, Tensor) and isinstance(actual, Tensor):
        for name, mark in vars(actual).items():
            if "_dynamo_" in name:
                setattr(stored, name, mark)


def _own(function: Callable) -> Callable:
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…"
