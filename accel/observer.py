"""Who hears of what takes long, or of what a user should know."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Hears of everything that takes long."""

    def loading(self, done: int, total: int) -> None:
        """`done` of `total` tensors are read."""

    def notice(self, text: str, warning: bool) -> None:
        """Something that a user should know, such as what was quantized, or that the compiler does not work."""

    def compiling(self, region: str) -> None:
        """A region begins to trace and compile, and nothing of it was compiled before."""

    def compiled(self, region: str, seconds: float, count: int, why: str) -> None:
        """A call compiled; `seconds` is that call, `count` the engine's compiles so far."""


class Silent:
    """An observer that ignores everything."""

    def loading(self, done: int, total: int) -> None:
        """Ignore."""

    def notice(self, text: str, warning: bool) -> None:
        """Ignore."""

    def compiling(self, region: str) -> None:
        """Ignore."""

    def compiled(self, region: str, seconds: float, count: int, why: str) -> None:
        """Ignore."""
