"""Optional packages that have an attention function: whether they are here, and work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version

from ..errors import first_line


@dataclass(frozen=True)
class Library:
    """A package with a function.

    Attributes:
        distribution: its name for pip; the version is asked by it.
        module: where the function is.
        function: the function's name.
        install: how to get it.
        oldest: the version from which on it serves; "" for any.
    """

    distribution: str
    module: str
    function: str
    install: str
    oldest: str = ""

    def missing(self) -> str | None:
        """Why it cannot be used: what the sentence after a backend's name says. Imports it, once per process."""
        found = find(self)
        return found if isinstance(found, str) else None

    def load(self) -> Callable[..., Any]:
        """The function.

        Raises:
            ImportError: `missing` says why.
        """
        found = find(self)
        if isinstance(found, str):
            raise ImportError(found)
        return found


@functools.cache
def find(library: Library) -> Callable[..., Any] | str:
    """A library's function, or why there is none."""
    name, install = library.distribution, library.install
    try:
        installed = version(name)
    except PackageNotFoundError:
        installed = ""  # a build that was not installed by pip: only importing it tells
    if installed and library.oldest and Version(installed) < Version(library.oldest):
        return f"needs {name} {library.oldest} or newer, installed is {installed}: {install}"
    try:
        return getattr(import_module(library.module), library.function)
    except ModuleNotFoundError as exc:
        if exc.name and f"{library.module}.".startswith(f"{exc.name}."):
            return f"needs the package {name}, which is not installed: {install}"
        return f"needs {name}, which does not load: the package {exc.name} is missing"
    except Exception as exc:  # an extension for another torch raises many kinds
        return (
            f"needs {name}, which is installed but does not load ({type(exc).__name__}: {first_line(exc)}). Often it "
            f"was built for another torch than {torch.__version__}: {install}"
        )


def has_operator(namespace: str, name: str, arguments: tuple[str, ...], keywords: tuple[str, ...] = ()) -> bool:
    """Whether a library registered an operator with PyTorch that can be called so.

    Args:
        namespace: of the operator.
        name: of the operator.
        arguments: what is given by position, in this order.
        keywords: what is given by name; the rest must have defaults.
    """
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return False
    declared = packet.default._schema.arguments
    first, rest = declared[: len(arguments)], declared[len(arguments) :]
    return (
        tuple(argument.name for argument in first) == arguments
        and {argument.name for argument in rest} >= set(keywords)
        and all(argument.has_default_value() or argument.name in keywords for argument in rest)
    )
