"""Quantized weights on disk, so that they are made once: entries of a disk store that the next start maps.

Each is written tensor by tensor while the model is converted. Beside the tensors stands how to put quantized parameters
together again, and the modules that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import FileIdentity
from ..settings import QuantizedCache
from ..store.disk import DiskStore
from ..store.entry import EntryWriter, Key
from .codec import described_modules, flatten

# Raise it when the same key would give other content.
FORMAT = "flux-hotswap-quantized-1"
SUFFIX = ".flux-hotswap.safetensors"

Notice = Callable[[str], None]


@dataclass(frozen=True)
class CacheKey:
    """Everything that the stored tensors depend on."""

    source: FileIdentity
    mode: str
    dtype: str
    device_type: str
    libraries: tuple[str, ...]

    @property
    def of_entry(self) -> Key:
        """The same as a disk store has it, with a name that people can read."""
        return Key.of({"format": FORMAT, **asdict(self)}, f"{Path(self.source.path).stem}-{self.mode}")


@dataclass(frozen=True)
class CachedModel:
    """A whole, checked model.

    Attributes:
        tensors: plain tensors by name, on the CPU: views of the file, read-only by convention.
        parameters: parameter name -> description for `codec.unflatten`.
        modules: module name -> description for `codec.make_module`.
        name: of its file.
        bytes: size of the file.
    """

    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Any]
    modules: Mapping[str, Any]
    name: str
    bytes: int


def store_of(cache: QuantizedCache) -> DiskStore:
    """The files of a cache."""
    return DiskStore(cache.folder, SUFFIX, cache.limit_bytes)


def open_cached(cache: QuantizedCache, key: CacheKey, on_progress: Callable[[int, int], None]) -> CachedModel | None:
    """Check and map the file of a key.

    Args:
        cache: where to look.
        key: what the model must have been made from.
        on_progress: called with (runs checked, runs in all).

    Returns:
        None when there is none.

    Raises:
        DamagedError: there is one, but it is damaged; it was deleted.
    """
    entry = store_of(cache).open(key.of_entry, on_progress)
    if entry is None:
        return None
    content = entry.content
    return CachedModel(entry.tensors, content["parameters"], content["modules"], entry.name, entry.bytes)


class CacheWriter:
    """Writes one cache file. What goes wrong with the disk is told once and ends the writing, not the load.

    Call order: `add` for every parameter, then `finish`; or `discard`.
    """

    def __init__(self, cache: QuantizedCache, key: CacheKey, expected_bytes: int, tensors: int, notice: Notice) -> None:
        """Make room and begin the file.

        Args:
            expected_bytes: what the tensors will take.
            tensors: about how many there will be.
            notice: gets a sentence for the user if the result cannot be stored.
        """
        self._folder = cache.folder
        self._notice = notice
        self._parameters: dict[str, Any] = {}
        self._writer: EntryWriter | None = None
        with self._told():
            self._writer = store_of(cache).writer(key.of_entry, expected_bytes, tensors)

    def add(self, name: str, parameter: Tensor) -> None:
        """Append a parameter; its data is written before this returns."""
        if self._writer is not None:
            tensors, self._parameters[name] = flatten(name, parameter.detach())
            with self._told():
                for part, tensor in tensors.items():
                    self._writer.add(part, tensor)

    def finish(self, model: nn.Module) -> None:
        """Write what puts the model together again, and give the file its name."""
        if self._writer is not None:
            with self._told():
                self._writer.finish({"parameters": self._parameters, "modules": dict(described_modules(model))})

    def discard(self) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.discard()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            self._writer = None
            self._notice(
                f"the quantized weights could not be stored in '{self._folder}' ({exc.strerror or exc}); the model "
                "works, and the next start converts it again. Free space there, or switch the cache off in Quantize "
                "Transformer."
            )
