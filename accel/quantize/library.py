"""The libraries that modes build on: whether they are installed, in a version that serves, beside this torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


@dataclass(frozen=True)
class Library:
    """A distribution.

    Attributes:
        name: for pip.
        oldest: the version from which on it has what we use.
        needs_torch: (from this version on it needs, this torch), newest last.
    """

    name: str
    oldest: str
    needs_torch: tuple[tuple[str, str], ...] = ()

    @property
    def installed(self) -> str:
        """Name and version, as part of what converted weights depend on."""
        return f"{self.name} {version(self.name)}"

    def missing(self) -> str | None:
        """Why it does not serve: what the sentence after a mode's name says; None: it does. Imports nothing."""
        try:
            found = Version(version(self.name))
        except PackageNotFoundError:
            return f"needs {self.name}, which is not installed: pip install '{self._wanted()}' in ComfyUI's Python"
        if found < Version(self.oldest):
            advice = f"pip install --upgrade '{self._wanted()}'"
            return f"needs {self.name} {self.oldest} or newer, installed is {found}: {advice}"
        limit = self._limit()
        if limit is not None and found >= Version(limit[0]):
            return (
                f"needs {self.name} older than {limit[0]} beside torch {version('torch')}, installed is {found}: "
                f"pip install '{self._wanted()}', or update torch to {limit[1]} or newer"
            )
        return None

    def _wanted(self) -> str:
        limit = self._limit()
        return f"{self.name}>={self.oldest}" + ("" if limit is None else f",<{limit[0]}")

    def _limit(self) -> tuple[str, str] | None:
        """The first version of it that this torch is too old for, and the torch that it needs."""
        torch = Version(version("torch"))
        return next((pair for pair in self.needs_torch if torch < Version(pair[1])), None)
