"""The model classes of diffusers, also where another package breaks its import.

diffusers imports whatever attention and quantization packages it finds, and takes an ImportError, OSError or
RuntimeError for "not there" (0.42.1, models/attention_dispatch.py); anything else ends its import. xformers 0.0.35
beside flash-attn-4 is such a case: it reads `flash_attn.__version__`, and flash-attn-4 has only the folder
`flash_attn/cute`. None of those packages is needed to build a transformer.

bitsandbytes opens a CUDA context when it is imported, and diffusers and PEFT import it where they find it. The pack
needs it for NF4 alone, which imports it itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import LibraryError

log = logging.getLogger(__name__)

# What diffusers cannot do without, and what PyTorch would take for absent ever after if it looked meanwhile.
_NEVER_HIDDEN = frozenset(("diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "triton"))
_MOST_HIDDEN = 3


@functools.cache
def model_class(name: str) -> type[nn.Module]:
    """A class of diffusers, which takes seconds to import. A package that breaks the import is kept from it.

    Args:
        name: a public name of diffusers, such as "FluxTransformer2DModel".

    Raises:
        LibraryError: diffusers is missing, too old, or does not load for a reason that lies in itself.
    """
    failures: list[Exception] = []
    attempts: list[dict[str, str]] = [{}]  # packages that are hidden, and why
    loaded_before = frozenset(sys.modules)
    for hidden in attempts:  # it grows meanwhile
        try:
            with _hidden_from_imports(hidden), _imported_when_used("bitsandbytes"):
                found = getattr(importlib.import_module("diffusers"), name)
        except Exception as exc:  # what a broken package raises is anything
            failures.append(exc)
            suspects = packages_behind(exc)
            _forget("diffusers", frozenset())
            for package in suspects[1:]:  # not who raised: what it registered with PyTorch is there for good
                _forget(package, loaded_before)
            if len(hidden) < _MOST_HIDDEN:
                attempts += [{**hidden, package: _root(exc)} for package in suspects if package not in hidden]
            continue
        for package, reason in hidden.items():
            log.warning(
                "Flux Hotswap: diffusers was loaded without '%s', which does not load here (%s). The pack runs without "
                "it. To be rid of this line, install a version of it for torch %s, or uninstall it.",
                _with_version(package), reason, torch.__version__,
            )  # fmt: skip
        return found
    raise LibraryError(_explain(failures[0])) from failures[0]


def packages_behind(exc: BaseException) -> list[str]:
    """The packages whose import by diffusers led to an exception, the one that raised it first."""
    chain = [exc]  # lazy imports wrap what they raise; the cause's frames are further in
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    frames = [frame for each in chain for frame, _ in traceback.walk_tb(each.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    packages = [module.partition(".")[0] for module in modules]
    last = max((number for number, package in enumerate(packages) if package == "diffusers"), default=len(packages))
    behind = dict.fromkeys(reversed(packages[last + 1 :]))
    return [package for package in behind if package not in _NEVER_HIDDEN | sys.stdlib_module_names and package]


@contextmanager
def _hidden_from_imports(packages: Collection[str]) -> Iterator[None]:
    """Let imports find none of the packages: with None in its place Python says that there is no such module."""
    before = {package: sys.modules[package] for package in packages if package in sys.modules}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for package in packages:
            del sys.modules[package]
        sys.modules.update(before)


@contextmanager
def _imported_when_used(package: str) -> Iterator[None]:
    """Give whoever imports a package meanwhile a module that imports it when something of it is used."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        yield
        return
    sys.modules[package] = later = _ImportedWhenUsed(package)
    later.__spec__ = spec
    try:
        yield
    finally:
        if sys.modules.get(package) is later:
            del sys.modules[package]


class _ImportedWhenUsed(ModuleType):
    """A module that nothing of was used yet."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__
        if sys.modules.get(package) is self:
            # inspect.getmodule asks every module for its __file__; the search for submodules needs the real one.
            if name.startswith("__") and name != "__path__":
                raise AttributeError(f"module '{package}' has no attribute '{name}' before it is used")
            del sys.modules[package]
        return getattr(importlib.import_module(package), name)


def _forget(package: str, kept: Collection[str]) -> None:
    """Let the next import of a package begin anew, so that it finds out again what is there."""
    for module in [name for name in sys.modules if name.partition(".")[0] == package and name not in kept]:
        del sys.modules[module]


def _explain(exc: Exception) -> str:
    if isinstance(exc, ModuleNotFoundError) and exc.name == "diffusers":
        return "The pack needs diffusers, which is not installed: run `pip install -r requirements.txt` in its folder."
    packages = ", ".join(f"'{_with_version(package)}'" for package in packages_behind(exc))
    return (
        f"'{_with_version('diffusers')}' cannot be imported ({_root(exc)})"
        + (f"; the error arises in {packages}: update or uninstall that." if packages else ".")
        + " The pack was tested with what its requirements.txt and requirements-dev.txt name."
    )


def _root(exc: BaseException) -> str:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return f"{type(exc).__name__}: {exc}"


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a module's name is not always its distribution's
        return package
